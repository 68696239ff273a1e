"""Tensors put together again from the core and rings, a block of rows at a time.

The inverse of `transfer`: every stream is read front to back once, two buffers are held, and no
tensor is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from star_elastic.corner import Bytes, Corner, total
from star_elastic.folder import Reader
from star_elastic.transfer import BLOCK

Write = Callable[[memoryview], object]


@dataclass
class Stream:
    """The bytes of one stored tensor, front to back; `offset` is how far it has been read."""

    reader: Reader
    name: str
    offset: int = 0

    def fill(self, buffer: memoryview) -> None:
        """The next bytes, as many as the buffer holds."""
        self.reader.fill(self.name, self.offset, buffer)
        self.offset += len(buffer)


Source = tuple[Corner, Stream]  # a corner of the tensor, and where its bytes come from


class Assembler:
    """Writes whole tensors whose bytes lie in several places.

    Args:
        block: bytes of rows that are put together at once; as many are read at most.
    """

    def __init__(self, block: int = BLOCK):
        self._block = block
        self._rows = np.empty(block, np.uint8)
        self._read = np.empty(block, np.uint8)

    def write(self, sources: Sequence[Source], size: int, write: Write) -> None:
        """One tensor of `size` bytes, which the corners cover; streams come in their own order."""
        if not size:
            return
        row = sources[0][0].row
        if row <= self._block:
            self._write(sources, range(size // row), row, write)
            return
        for index in range(size // row):  # rows longer than a block: byte by byte
            lines = [(corner.line(index), stream) for corner, stream in sources]
            self._write(lines, range(index * row, (index + 1) * row), 1, write)

    def _write(self, sources: Sequence[Source], rows: range, row: int, write: Write) -> None:
        step = self._block // row
        for start in rows[::step]:
            count = min(step, rows.stop - start)
            block = self._rows[: count * row].reshape(count, row)
            for corner, stream in sources:
                self._put(corner, stream, block, start)
            write(block.reshape(-1).data)

    def _put(self, corner: Corner, stream: Stream, block: Bytes, start: int) -> None:
        size = total(corner.within(start, start + len(block))) * corner.width
        data = self._read[:size]
        if size:
            stream.fill(data.data)
            corner.put(block, start, data)
