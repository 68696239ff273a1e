"""Corners of stored tensors from a folder's files to any number of writers, in bounded memory.

Every byte that any writer wants is read once, in the order of the files; while one block is handed
out, the next is read.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from typing import NamedTuple

import numpy as np

from star_elastic.corner import Bytes, Corner, union
from star_elastic.folder import Reader

BLOCK = 8 * 2**20  # bytes that are read at once; two blocks are held
Write = Callable[[memoryview], None]
Wanted = Sequence[tuple[Corner, Write]]  # corners of one tensor, each with what takes its bytes


class _Block(NamedTuple):
    """Some whole rows of a tensor, and who wants a part of them."""

    name: str
    start: int
    rows: int
    row: int
    wanted: Wanted


def transfer(
    reader: Reader,
    wanted: Mapping[str, Wanted],
    progress: Callable[[int], None] | None = None,
    block: int = BLOCK,
) -> None:
    """Read the rows that any corner wants and give every writer its own, tensor by tensor.

    Args:
        wanted: by the tensors' names, in the order in which writers expect them.
        progress: hears of the bytes of every block.

    Raises:
        CheckpointError: a file that cannot be read.
    """
    transfer_each(reader, wanted.items(), progress, block)


def transfer_each(
    reader: Reader,
    wanted: Iterable[tuple[str, Wanted]],
    progress: Callable[[int], None] | None = None,
    block: int = BLOCK,
) -> None:
    """`transfer`, where one tensor may come several times: whole for some writers, then again."""
    blocks = (each for name, takers in wanted for each in _blocks(name, takers, block))
    for (_, start, rows, row, takers), data in _read_ahead(reader, blocks, block):
        whole = data.reshape(rows, row)
        for corner, write in takers:
            for part in corner.cut(whole, start):
                write(np.ascontiguousarray(part).reshape(-1).data)
        if progress is not None:
            progress(len(data))


def _read_ahead(
    reader: Reader, blocks: Iterator[_Block], size: int
) -> Iterator[tuple[_Block, Bytes]]:
    """Every block with its bytes, which stay until the next but one is asked for."""
    buffers = cycle([bytearray(size), bytearray(size)])

    def load(block: _Block) -> Bytes:
        view = memoryview(next(buffers))[: block.rows * block.row]
        reader.fill(block.name, block.start * block.row, view)
        return np.frombuffer(view, np.uint8)

    with ThreadPoolExecutor(1) as thread:
        pending = None
        for block in blocks:
            before, pending = pending, (block, thread.submit(load, block))
            if before is not None:
                yield before[0], before[1].result()
        if pending is not None:
            yield pending[0], pending[1].result()


def _blocks(name: str, wanted: Wanted, size: int) -> Iterator[_Block]:
    row = wanted[0][0].row
    if row > size:  # such a row is a tensor of its own whose rows are bytes
        for first, count in union(corner.rows for corner, _ in wanted):
            for index in range(first, first + count):
                yield from _blocks(name, [(c.line(index), write) for c, write in wanted], size)
        return
    for first, count in union(corner.rows for corner, _ in wanted):
        for start in range(first, first + count, size // row):
            yield _Block(name, start, min(size // row, first + count - start), row, wanted)
