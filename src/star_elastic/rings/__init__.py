"""A core and rings: an elastic checkpoint that moves one size at a time (docs/rings.md)."""

from star_elastic.rings.chain import chain_of
from star_elastic.rings.fetch import Packed, open_packed
from star_elastic.rings.pack import bytes_to_read, pack
from star_elastic.rings.unpack import number_of, unpack, unpack_from

__all__ = [
    "Packed",
    "bytes_to_read",
    "chain_of",
    "number_of",
    "open_packed",
    "pack",
    "unpack",
    "unpack_from",
]
