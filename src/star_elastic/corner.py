"""Which bytes of a stored tensor a submodel keeps: rows, and parts of each row.

A tensor is rows of equal length; a corner is some runs of rows, and of each of these rows the same
runs of bytes. Everything that moves weights on disk is said in corners: slices, rings, comparisons.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np
from numpy.typing import NDArray

from star_elastic.layout import Weight
from star_elastic.shapes import Run, Sizes

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Corner:
    """Runs of rows, and runs of bytes in each of them, of a tensor with rows of `row` bytes."""

    row: int
    rows: tuple[Run, ...]
    columns: tuple[Run, ...]

    @property
    def width(self) -> int:
        """Bytes kept of each row."""
        return total(self.columns)

    @property
    def bytes(self) -> int:
        """Bytes kept."""
        return total(self.rows) * self.width

    def within(self, start: int, stop: int) -> tuple[Run, ...]:
        """The rows kept of those from `start` to `stop`, counted from `start`."""
        found = ((max(first, start), min(first + n, stop)) for first, n in self.rows)
        return tuple((first - start, last - first) for first, last in found if last > first)

    def cut(self, block: Bytes, start: int) -> Iterable[Bytes]:
        """What is kept of a block of whole rows that begins at row `start`, in order."""
        for first, count in self.within(start, start + len(block)):
            yield columns_of(block[first : first + count], self.columns)

    def put(self, block: Bytes, start: int, data: Bytes) -> None:
        """The inverse of `cut`: write what was kept into a block of whole rows."""
        done = 0
        for first, count in self.within(start, start + len(block)):
            part = data[done : done + count * self.width].reshape(count, self.width)
            done += count * self.width
            offset = 0
            for begin, length in self.columns:
                block[first : first + count, begin : begin + length] = part[
                    :, offset : offset + length
                ]
                offset += length

    def line(self, index: int) -> "Corner":
        """What is kept of one row, byte by byte: of the same tensor as rows of one byte each."""
        kept = any(first <= index < first + count for first, count in self.rows)
        begin = index * self.row
        rows = tuple((begin + start, length) for start, length in self.columns if kept)
        return replace(self, row=1, rows=rows, columns=((0, 1),))


def corner_of(weight: Weight, itemsize: int, parent: Sizes, child: Sizes) -> Corner:
    """The corner of a stored weight that a submodel keeps.

    Raises:
        ValueError: a cut inside a block of codes that share a byte or a scale.
    """
    shape = weight.shape(parent) or (1,)
    kept = dict(weight.cuts(parent, child))
    runs = [kept.get(position, [(0, size)]) for position, size in enumerate(shape)]
    columns, width = [(0, itemsize)], itemsize
    for size, some in zip(reversed(shape[1:]), reversed(runs[1:]), strict=True):
        if columns == [(0, width)]:  # whole: one run, however many
            columns = [(first * width, count * width) for first, count in some]
        else:
            columns = [
                (index * width + start, length)
                for first, count in some
                for index in range(first, first + count)
                for start, length in columns
            ]
        width *= size
    return Corner(prod(shape[1:]) * itemsize, tuple(runs[0]), tuple(union([columns])))


def union(many: Iterable[Sequence[Run]]) -> list[Run]:
    """The indices that are in any of several lists of runs."""
    found: list[Run] = []
    for start, length in sorted(run for runs in many for run in runs if run[1]):
        if found and sum(found[-1]) >= start:
            end = max(sum(found[-1]), start + length)
            found[-1] = (found[-1][0], end - found[-1][0])
        else:
            found.append((start, length))
    return found


def without(runs: Iterable[Run], others: Sequence[Run]) -> list[Run]:
    """The indices that are in some runs and in none of the others; both ascending."""
    found: list[Run] = []
    for start, length in runs:
        stop = start + length
        for other, size in others:
            if start < other + size and other < stop:
                if start < other:
                    found.append((start, other - start))
                start = other + size
        if start < stop:
            found.append((start, stop - start))
    return found


def total(runs: Iterable[Run]) -> int:
    """How many indices there are in runs."""
    return sum(length for _, length in runs)


def columns_of(rows: Bytes, columns: Sequence[Run]) -> Bytes:
    """Some runs of bytes of every row, as rows; a view where one run suffices."""
    parts = [rows[:, start : start + length] for start, length in columns]
    return parts[0] if len(parts) == 1 else np.concatenate([rows[:, :0], *parts], axis=1)
