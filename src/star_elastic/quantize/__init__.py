"""Nested low precision: an elastic checkpoint as codes and scales, once for all of its sizes."""

from star_elastic.quantize.plan import Plan, broken, make_plan
from star_elastic.quantize.write import bytes_to_read, quantize_checkpoint

__all__ = [
    "Plan",
    "broken",
    "bytes_to_read",
    "make_plan",
    "quantize_checkpoint",
]
