"""Is a checkpoint what it says? Values and nesting, read in bounded memory.

`Checkpoint.open` holds names, shapes, dtypes, declarations and digests against one another; what is
left are the values: that they are numbers, and that a slice is the parent's corner bit for bit.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from star_elastic.checkpoint import Checkpoint
from star_elastic.corner import Corner
from star_elastic.folder import CheckpointError, Reader
from star_elastic.packed import SHAPE
from star_elastic.slicing import custom, plan
from star_elastic.submodel import Fields
from star_elastic.transfer import Wanted, transfer

Progress = Callable[[int], None]
# dtype -> (unsigned integer, bits that are all ones where a value is no number)
_NO_NUMBER = {
    "F32": (np.uint32, 0x7F800000),
    "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80),
    "F8_E5M2": (np.uint8, 0x7C),
    "F8_E4M3": (np.uint8, 0x7F),  # it has no infinity, and one NaN
    "F64": (np.uint64, 0x7FF0000000000000),
}


def check_finite(checkpoint: Checkpoint, progress: Progress | None = None) -> None:
    """Refuse a NaN or an infinity anywhere in the weights.

    Raises:
        CheckpointError: naming file, tensor, how many there are and where the first is.
    """
    stored = checkpoint.stored
    wanted: dict[str, Wanted] = {}
    searches: dict[str, _Search] = {}
    for name, each in stored.items():
        if each.dtype in _NO_NUMBER and each.end > each.start:
            searches[name] = _Search(each.dtype)
            whole = Corner(1, ((0, each.end - each.start),), ((0, 1),))
            wanted[name] = [(whole, searches[name].look)]
    with Reader(checkpoint.path, stored) as reader:
        transfer(reader, wanted, progress)
    for name, search in searches.items():
        if search.found:
            raise CheckpointError(
                f"{checkpoint.path / stored[name].file}: {name}: {search.found} values are no "
                f"numbers, the first at index {search.first}"
            )


def check_slice(
    checkpoint: Checkpoint, other: Checkpoint, progress: Progress | None = None
) -> Fields:
    """Is another checkpoint, bit for bit, a size of this one? Returns its fields.

    Raises:
        CheckpointError: of another family, no size this parent can hold, a tensor that differs.
    """
    fields = _fields_of(checkpoint, other)
    try:
        planned = plan(checkpoint, custom(checkpoint, fields))
    except ValueError as error:
        raise CheckpointError(f"{other.path}: no size of {checkpoint.path}: {error}") from None
    mine, parents = Reader(other.path, other.stored), Reader(checkpoint.path, checkpoint.stored)
    with mine, parents:
        wanted: dict[str, Wanted] = {}
        for piece in planned.pieces.values():
            there = other.stored.get(piece.name)
            if there is None or (there.dtype, there.shape) != (piece.spec.dtype, piece.spec.shape):
                raise CheckpointError(f"{other.path}: {piece.name}: not as in {checkpoint.path}")
            if not piece.name.endswith(SHAPE):
                compare = _Comparison(mine, other.path / there.file, piece.name)
                wanted[piece.weight.name] = [(piece.corner, compare.next)]
        transfer(parents, wanted, progress)
    return fields


class _Search:
    """Looks for values that are no numbers in a stream of bytes."""

    def __init__(self, dtype: str):
        self._kind, self._mask = _NO_NUMBER[dtype]
        self._seen = 0
        self.found = 0
        self.first = 0

    def look(self, data: memoryview) -> None:
        values = np.frombuffer(data, self._kind)
        bad = (values & self._mask) == self._mask
        if count := int(np.count_nonzero(bad)):
            self.first = self.first if self.found else self._seen + int(np.argmax(bad))
            self.found += count
        self._seen += len(values)


class _Comparison:
    """Holds a stream of bytes against a tensor on disk."""

    def __init__(self, reader: Reader, path: Path, name: str):
        self._reader, self._path, self._name = reader, path, name
        self._done = 0

    def next(self, data: memoryview) -> None:
        mine = memoryview(bytearray(len(data)))
        self._reader.fill(self._name, self._done, mine)
        if mine != data:
            raise CheckpointError(f"{self._path}: {self._name}: differs from the parent's corner")
        self._done += len(data)


def _fields_of(checkpoint: Checkpoint, other: Checkpoint) -> dict[str, int | list[int]]:
    """The fields in which another checkpoint's parent is smaller than this one's."""
    mine, theirs = checkpoint.layout, other.layout
    if mine.family is not theirs.family:
        raise CheckpointError(f"{other.path}: a {theirs.family.model_type} model")
    return {
        axis: theirs.sizes[axis] for axis in mine.axes if theirs.sizes[axis] != mine.sizes[axis]
    }
