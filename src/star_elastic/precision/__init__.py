"""Numbers of fewer bits: which matrices become codes, their scales, and what codes mean."""

from star_elastic.precision.floats import FP8, NVFP4
from star_elastic.precision.format import Format, Scales, computed_in, largest_of
from star_elastic.precision.formats import FORMATS, format_of
from star_elastic.precision.integers import INT4, INT8, Groups, INT8Groups
from star_elastic.precision.keep import ignored, quantized
from star_elastic.precision.matrices import CodedExperts, CodedLinear, CodedMatrix

__all__ = [
    "FORMATS",
    "CodedExperts",
    "CodedLinear",
    "CodedMatrix",
    "FP8",
    "INT4",
    "INT8",
    "NVFP4",
    "Format",
    "Groups",
    "INT8Groups",
    "Scales",
    "computed_in",
    "format_of",
    "ignored",
    "largest_of",
    "quantized",
]
