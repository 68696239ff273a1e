"""Our own pass over a safetensors header, before any library sees the file.

The safetensors package accepts duplicate tensor names, blanks before the header and names such as
`../../etc/passwd`; here all of these are refused, with the tensor's name.
"""

import json
import math
import os
import re
import struct
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from star_elastic.dtypes import STORED_ITEMSIZE
from star_elastic.folder.trust import CheckpointError, one_line, parse_json

# What a second suffices to read; a trillion parameters in 60 files have 2,000 tensors in each. The
# format's own limit is 100 MB.
MAX_HEADER = 8 * 2**20  # bytes
_MAX_TENSORS = 2**15
_MAX_RANK = 8
_MAX_SIZE = 2**48  # bytes or elements; more would be 256 TiB in one file
_NAME = re.compile(r"(?=.{1,255}\Z)[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*\Z")


class Stored(NamedTuple):
    """A tensor as a safetensors header declares it; `start` and `end` are bytes of the file.

    `stamp` is what tells that file from another, or from itself once somebody has written to it.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int
    stamp: tuple[int, ...] = ()


class Spec(NamedTuple):
    """A tensor to be written; `dtype` as safetensors names it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Its size on disk."""
        return math.prod(self.shape) * STORED_ITEMSIZE[self.dtype]


def read_header(descriptor: int, file: str, where: str) -> dict[str, Stored]:
    """The tensors of an open file, in the order of their bytes.

    Args:
        file: its name, for `Stored`; where: its name in errors.

    Raises:
        CheckpointError: anything but a well-formed header whose tensors cover the data exactly.
    """
    try:
        stamp = stamp_of(descriptor)
        size = os.fstat(descriptor).st_size
        prefix = os.pread(descriptor, 8, 0)
        if len(prefix) < 8:
            raise ValueError(f"{size} bytes, too few for a header")
        (length,) = struct.unpack("<Q", prefix)
        if length > min(MAX_HEADER, size - 8):
            raise ValueError(f"header of {length} bytes in a file of {size}")
        found = parse_header(os.pread(descriptor, length, 8), size, file)
        return {name: each._replace(stamp=stamp) for name, each in found.items()}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{where}: bad safetensors header: {one_line(error)}") from None


def stamp_of(descriptor: int) -> tuple[int, ...]:
    """Device, number, size and time of the last change of an open file."""
    found = os.fstat(descriptor)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def parse_header(text: bytes, size: int, file: str) -> dict[str, Stored]:
    """The tensors of a header's JSON, in a file of `size` bytes.

    Raises:
        ValueError: naming the tensor and what is wrong with it.
    """
    if text[:1] != b"{":
        raise ValueError("it does not begin with {")
    if (count := text.count(b"data_offsets")) > _MAX_TENSORS:
        raise ValueError(f"{count} tensors; at most {_MAX_TENSORS} are read")
    header = parse_json(text)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("__metadata__: not a map from text to text")
    begin = 8 + len(text)
    found = [_stored(name, entry, file, begin) for name, entry in header.items()]
    found.sort(key=lambda each: (each[1].start, each[1].end))
    _check_cover(found, begin, size)
    _check_names(header)
    return dict(found)


def parse_file(data: bytes, file: str) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors and the metadata of a small file that is in memory as a whole.

    Raises:
        ValueError: see `read_header`.
    """
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(MAX_HEADER, len(data) - 8):
        raise ValueError(f"header of {length} bytes in a file of {len(data)}")
    text = data[8 : 8 + length]
    return parse_header(text, len(data), file), parse_json(text).get("__metadata__", {})


def header_bytes(specs: Sequence[Spec]) -> bytes:
    """The header of a file whose tensors follow one another; its length is a multiple of 8."""
    start = 0
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for spec in specs:
        offsets = [start, start + spec.bytes]
        header[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": offsets,
        }
        start += spec.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _stored(name: str, entry: Any, file: str, begin: int) -> tuple[str, Stored]:
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [start, end], **rest}:
            pass
        case _:
            raise ValueError(f"{shown(name)}: not a map of dtype, shape and data_offsets")
    if rest:
        raise ValueError(f"{shown(name)}: unknown key {min(rest)!r}")
    if dtype not in STORED_ITEMSIZE:
        raise ValueError(f"{shown(name)}: unknown dtype {dtype[:20]!r}")
    if len(shape) > _MAX_RANK or not all(type(n) is int and 0 <= n < _MAX_SIZE for n in shape):
        raise ValueError(f"{shown(name)}: shape {str(shape)[:80]}: not up to 8 sizes")
    if not all(type(n) is int and 0 <= n < _MAX_SIZE for n in (start, end)) or start > end:
        raise ValueError(f"{shown(name)}: data_offsets {str([start, end])[:80]}: not a range")
    if end - start != math.prod(shape) * STORED_ITEMSIZE[dtype]:
        raise ValueError(f"{shown(name)}: {end - start} bytes for shape {shape} of {dtype}")
    return name, Stored(file, dtype, tuple(shape), begin + start, begin + end)


def _check_cover(found: Sequence[tuple[str, Stored]], begin: int, size: int) -> None:
    """The tensors cover the data exactly: no hole, no overlap, no tail."""
    reached = begin
    for name, stored in found:
        if stored.start != reached:
            kind = "leave a hole" if stored.start > reached else "overlap"
            offsets = [stored.start - begin, stored.end - begin]
            raise ValueError(f"{shown(name)}: data_offsets {offsets} {kind}")
        reached = stored.end
    if reached != size:
        raise ValueError(f"tensors end at byte {reached} of {size}")


def _check_names(header: Mapping[str, Any]) -> None:
    for name in header:
        if not _NAME.match(name):
            raise ValueError(f"{shown(name)}: not a tensor's name")
    for one, other in pairwise(sorted(header, key=str.lower)):
        if one.lower() == other.lower():
            raise ValueError(f"{one} and {other}: differ in case only")


def shown(name: str) -> str:
    """A name as it may stand in one line of an error."""
    return name if _NAME.match(name) else repr(name[:80])
