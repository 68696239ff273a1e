"""Numbers of fewer bits: which matrices become codes, their scales, and what codes mean."""

from star_elastic.precision.formats import FORMATS, Format, format_of
from star_elastic.precision.keep import ignored, quantized

__all__ = ["FORMATS", "Format", "format_of", "ignored", "quantized"]
