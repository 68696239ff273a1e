"""Safetensors headers that nobody vouches for: refused by tensor and reason before a byte is read.

The file stands in a folder whose config is sound; what it says is all that is wrong.
"""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from folders import WEIGHTS
from hostile import answers, refuses

from star_elastic.checkpoint import Checkpoint
from star_elastic.folder import stored_tensors


def entry(start: int = 0, end: int = 8, shape: Any = (2,), dtype: Any = "F32", **more: Any) -> Any:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end], **more}


def file_of(header: Any, data: int = 8) -> bytes:
    """A file with this header, as JSON or as it is, and so many bytes of data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data)


def one(data: int = 8, **changes: Any) -> bytes:
    """A file of one tensor, `a`."""
    return file_of({"a": entry() | changes}, data)


def twice(key: str, value: str) -> bytes:
    """A file whose header has a key two times."""
    return file_of(f'{{"{key}":{value},"{key}":{value}}}'.encode())


SOUND = json.dumps({"a": entry()}).encode()
A = json.dumps(entry())
LONG = "9" * 10**6

# id -> (the whole file, what the error names beside the file)
FILES: dict[str, tuple[bytes, tuple[str, ...]]] = {
    # the frame
    "empty": (b"", ("header", "0 bytes, too few")),
    "one-byte": (b"\0", ("header", "1 bytes, too few")),
    "seven-bytes": (bytes(7), ("header", "7 bytes, too few")),
    "length-0": (bytes(16), ("header", "does not begin with {")),
    "length-0-and-no-data": (bytes(8), ("header", "does not begin with {")),
    "length-past-the-end": (struct.pack("<Q", 99) + b"{}", ("header of 99 bytes", "file of 10")),
    "length-one-too-many": (
        struct.pack("<Q", len(SOUND) + 9) + SOUND + bytes(8),
        (f"header of {len(SOUND) + 9} bytes", f"file of {len(SOUND) + 16}"),
    ),
    "length-2^63": (struct.pack("<Q", 2**63) + b"{}", (f"header of {2**63} bytes",)),
    "length-2^64-1": (struct.pack("<Q", 2**64 - 1) + b"{}", (f"header of {2**64 - 1} bytes",)),
    "length-above-the-format's": (
        struct.pack("<Q", 100_000_001) + b"{}",
        ("header of 100000001 bytes",),
    ),
    "truncated-header": (file_of(SOUND)[:20], (f"header of {len(SOUND)} bytes", "file of 20")),
    "truncated-data": (file_of(SOUND)[:-1], ("tensors end at byte", str(len(SOUND) + 16))),
    "no-data": (file_of(SOUND, 0), ("tensors end at byte", f"of {len(SOUND) + 8}")),
    "tail": (file_of(SOUND, 9), (f"tensors end at byte {len(SOUND) + 16} of {len(SOUND) + 17}",)),
    "data-and-no-tensor": (file_of({}), ("tensors end at byte 10 of 18",)),
    # the text
    "blank-first": (file_of(b" " + SOUND), ("does not begin with {",)),
    "newline-first": (file_of(b"\n" + SOUND), ("does not begin with {",)),
    "byte-order-mark": (file_of(b"\xef\xbb\xbf" + SOUND), ("does not begin with {",)),
    "array": (file_of(b"[]"), ("does not begin with {",)),
    "array-around": (file_of([{"a": entry()}]), ("does not begin with {",)),
    "bad-utf-8": (file_of(b'{"\xff":1}'), ("utf-8",)),
    "utf-16": (file_of("{}".encode("utf-16-le")), ("Expecting property name",)),
    "half-json": (file_of(SOUND[:-1]), ("Expecting",)),
    "two-objects": (file_of(SOUND + b"{}"), ("Extra data",)),
    "nul-behind": (file_of(SOUND + b"\0"), ("Extra data",)),
    "comment": (file_of(b"{/**/}"), ("Expecting property name",)),
    "deep-200": (file_of(b'{"a":' * 200 + b"1" + b"}" * 200), ("a: not a map of dtype",)),
    "deep-100000": (file_of(b'{"a":' * 100_000), ("nested too deep",)),
    "deep-arrays": (file_of(b'{"a":' + b"[" * 100_000), ("nested too deep",)),
    "duplicate-tensor": (twice("a", A), ("duplicate key 'a'",)),
    "duplicate-metadata": (twice("__metadata__", "{}"), ("duplicate key '__metadata__'",)),
    "duplicate-in-entry": (
        file_of(b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}'),
        ("duplicate key 'dtype'",),
    ),
    "duplicate-by-escape": (
        file_of(f'{{"a":{A},"\\u0061":{A}}}'.encode()),
        ("duplicate key 'a'",),
    ),
    "nan": (file_of(b'{"a":NaN}'), ("a: not a map of dtype",)),
    "nan-dim": (
        file_of(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}'),
        ("a: shape [nan]", "sizes"),
    ),
    "infinite-offset": (
        file_of(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,Infinity]}}'),
        ("a: data_offsets [0, inf]", "range"),
    ),
    "million-digits": (
        file_of(f'{{"a":{{"dtype":"F32","shape":[{LONG}],"data_offsets":[0,8]}}}}'.encode()),
        ("4300 digits",),
    ),
    # metadata
    "metadata-list": (file_of({"__metadata__": [], "a": entry()}), ("__metadata__: not a map",)),
    "metadata-null": (file_of({"__metadata__": None}), ("__metadata__: not a map",)),
    "metadata-number": (
        file_of({"__metadata__": {"format": 1}, "a": entry()}),
        ("__metadata__: not a map from text to text",),
    ),
    "metadata-nested": (
        file_of({"__metadata__": {"format": {}}, "a": entry()}),
        ("__metadata__: not a map from text to text",),
    ),
    # an entry
    "entry-null": (file_of({"a": None}), ("a: not a map of dtype",)),
    "entry-text": (file_of({"a": "F32"}), ("a: not a map of dtype",)),
    "entry-list": (file_of({"a": ["F32", [2], [0, 8]]}), ("a: not a map of dtype",)),
    "no-dtype": (
        file_of({"a": {"shape": [2], "data_offsets": [0, 8]}}),
        ("a: not a map of dtype, shape and data_offsets",),
    ),
    "no-shape": (
        file_of({"a": {"dtype": "F32", "data_offsets": [0, 8]}}),
        ("a: not a map of dtype, shape and data_offsets",),
    ),
    "no-offsets": (
        file_of({"a": {"dtype": "F32", "shape": [2]}}),
        ("a: not a map of dtype, shape and data_offsets",),
    ),
    "unknown-key": (one(strides=[1]), ("a: unknown key 'strides'",)),
    "unknown-key-that-clears-the-screen": (
        one(**{"\x1b[2J\nok": 1}),
        ("a: unknown key '\\x1b[2J\\nok'",),
    ),
    # a dtype
    "unknown-dtype": (one(dtype="F31"), ("a: unknown dtype 'F31'",)),
    "lower-case-dtype": (one(dtype="f32"), ("a: unknown dtype 'f32'",)),
    "config's-dtype": (one(dtype="float32"), ("a: unknown dtype 'float32'",)),
    "empty-dtype": (one(dtype=""), ("a: unknown dtype ''",)),
    "sub-byte-dtype": (one(dtype="F4"), ("a: unknown dtype 'F4'",)),
    "dtype-of-a-megabyte": (one(dtype="F" * 10**6), ("a: unknown dtype 'FFFFFFFFFFFFFFFFFFFF'",)),
    "dtype-number": (one(dtype=32), ("a: not a map of dtype",)),
    # a shape
    "negative-dim": (one(shape=[-2]), ("a: shape [-2]", "sizes")),
    "two-negative-dims": (one(shape=[-1, -2]), ("a: shape [-1, -2]", "sizes")),
    "float-dim": (one(shape=[2.0]), ("a: shape [2.0]", "sizes")),
    "bool-dim": (one(8, shape=[2, True]), ("a: shape [2, True]", "sizes")),
    "text-dim": (one(shape=["2"]), ("a: shape ['2']", "sizes")),
    "null-dim": (one(shape=[None]), ("a: shape [None]", "sizes")),
    "nested-dim": (one(shape=[[2]]), ("a: shape [[2]]", "sizes")),
    "shape-text": (one(shape="2"), ("a: not a map of dtype, shape",)),
    "shape-number": (one(shape=2), ("a: not a map of dtype, shape",)),
    "dim-2^63": (one(shape=[2**63]), (f"a: shape [{2**63}]", "sizes")),
    "dims-that-overflow": (
        one(shape=[2**32, 2**32 + 1]),
        ("a: 8 bytes for shape [4294967296, 4294967297] of F32",),
    ),
    "two-tensors-of-2^63-64": (
        file_of({n: entry(0, 2**63 - 64, [2**63 - 64], "U8") for n in "ab"}),
        (f"a: shape [{2**63 - 64}]", "sizes"),
    ),
    "two-tensors-of-2^47": (
        file_of({"a": entry(0, 2**47, [2**47], "U8"), "b": entry(2**47, 2**48 - 1, [1], "U8")}),
        ("b:", "bytes for shape [1] of U8"),
    ),
    "rank-9": (one(shape=[1] * 8 + [2]), ("a: shape [1, 1", "up to 8 sizes")),
    "rank-100000": (one(shape=[1] * 100_000), ("a: shape [1, 1", "up to 8 sizes")),
    "shape-of-other-bytes": (one(shape=[3]), ("a: 8 bytes for shape [3] of F32",)),
    "dtype-of-other-bytes": (one(dtype="BF16"), ("a: 8 bytes for shape [2] of BF16",)),
    # its place
    "offsets-swapped": (one(data_offsets=[8, 0]), ("a: data_offsets [8, 0]", "range")),
    "negative-offset": (one(data_offsets=[-8, 0]), ("a: data_offsets [-8, 0]", "range")),
    "float-offset": (one(data_offsets=[0, 8.0]), ("a: data_offsets [0, 8.0]", "range")),
    "bool-offset": (one(data_offsets=[False, 8]), ("a: data_offsets [False, 8]", "range")),
    "text-offset": (one(data_offsets=["0", "8"]), ("a: data_offsets ['0', '8']", "range")),
    "offset-2^63": (one(data_offsets=[0, 2**63]), (f"a: data_offsets [0, {2**63}]", "range")),
    "three-offsets": (one(data_offsets=[0, 4, 8]), ("a: not a map of dtype",)),
    "offsets-map": (one(data_offsets={"0": 8}), ("a: not a map of dtype",)),
    "offsets-past-the-end": (one(data_offsets=[8, 16]), ("a: data_offsets [8, 16] leave a hole",)),
    "hole-first": (one(12, data_offsets=[4, 12]), ("a: data_offsets [4, 12] leave a hole",)),
    "hole-between": (
        file_of({"a": entry(), "b": entry(9, 17)}, 17),
        ("b: data_offsets [9, 17] leave a hole",),
    ),
    "overlap": (
        file_of({"a": entry(), "b": entry(4, 12)}, 12),
        ("b: data_offsets [4, 12] overlap",),
    ),
    "same-range": (file_of({"a": entry(), "b": entry()}), ("b: data_offsets [0, 8] overlap",)),
    "inside-another": (
        file_of({"a": entry(), "b": entry(0, 4, [1])}),
        ("a: data_offsets [0, 8] overlap",),
    ),
    # a name
    "name-with-dots": (file_of({"../../etc/passwd": entry()}), ("'../../etc/passwd': not a",)),
    "name-with-slash": (file_of({"a/b": entry()}), ("'a/b': not a tensor's name",)),
    "absolute-name": (file_of({"/etc/passwd": entry()}), ("'/etc/passwd': not a tensor's name",)),
    "name-with-nul": (file_of({"a\0b": entry()}), ("'a\\x00b': not a tensor's name",)),
    "name-with-newline": (file_of({"a\n": entry()}), ("'a\\n': not a tensor's name",)),
    "name-with-blank": (file_of({"a b": entry()}), ("'a b': not a tensor's name",)),
    "name-with-escape": (file_of({"\x1b[2J": entry()}), ("'\\x1b[2J': not a tensor's name",)),
    "half-a-surrogate": (file_of({"\ud800": entry()}), ("'\\ud800': not a tensor's name",)),
    "unicode-name": (file_of({"wäight": entry()}), ("'wäight': not a tensor's name",)),
    "wide-letters": (file_of({"ｗeight": entry()}), ("not a tensor's name",)),
    "empty-name": (file_of({"": entry()}), ("'': not a tensor's name",)),
    "name-of-300": (file_of({"a" * 300: entry()}), ("a" * 80 + "': not a tensor's name",)),
    "dot": (file_of({".": entry()}), ("'.': not a tensor's name",)),
    "trailing-dot": (file_of({"a.": entry()}), ("'a.': not a tensor's name",)),
    "empty-step": (file_of({"a..b": entry()}), ("'a..b': not a tensor's name",)),
    "names-of-one-case": (
        file_of({"a.Weight": entry(), "a.weight": entry(8, 16)}, 16),
        ("a.Weight and a.weight: differ in case only",),
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_safetensors(folder: Path, name: str) -> None:
    data, named = FILES[name]
    (folder / WEIGHTS).write_bytes(data)
    refuses(folder, f"elastic/{WEIGHTS}: bad safetensors header: ", *named)


def many(count: int, offsets: str = "[0,4]") -> bytes:
    tensor = f'{{"dtype":"F32","shape":[1],"data_offsets":{offsets}}}'
    return file_of(("{" + ",".join(f'"t{n}":{tensor}' for n in range(count)) + "}").encode(), 4)


def test_as_many_tensors_of_one_range_as_are_read(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(many(2**15))
    refuses(folder, WEIGHTS, "t1: data_offsets [0, 4] overlap", cpu=4)


def test_more_tensors_than_are_read(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(many(2**15 + 1))
    refuses(folder, WEIGHTS, "32769 tensors; at most 32768 are read")


def test_a_header_longer_than_is_read(folder: Path) -> None:
    """It is not even read: the file is sparse."""
    with (folder / WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", 10**8) + b"{")
        file.truncate(2 * 10**8)
    refuses(folder, WEIGHTS, "header of 100000000 bytes in a file of 200000000")


def test_cut_off_at_every_byte_of_its_header(folder: Path) -> None:
    """And at places of its data, the last byte among them."""
    data = (folder / WEIGHTS).read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    for size in [*range(0, end, 7), *range(end, len(data), 4096), len(data) - 1]:
        (folder / WEIGHTS).write_bytes(data[:size])
        with answers(folder, f"{WEIGHTS}: bad safetensors header: ", str(size)):
            stored_tensors(folder)


def test_what_is_odd_and_sound(folder: Path) -> None:
    """Blanks behind the header and any metadata of text pass; the corpus above is not all noise."""
    data = (folder / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = {"": "", "ключ": "\0"}
    text = json.dumps(header).encode() + b"  \n"
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    assert Checkpoint.open(folder, check_digests=False).is_elastic
