"""One file, written front to back in large aligned blocks."""

import fcntl
import mmap
import os
from contextlib import suppress
from pathlib import Path

_BLOCK = 8 * 2**20  # bytes; a multiple of every disk's sector


class Output:
    """A new file, written past the page cache where its file system can (`O_DIRECT`).

    A copy larger than the memory to spare would throw everything else out of the page cache, and
    filling the cache costs more than writing to a fast disk does.

    Raises:
        OSError: the file exists, the disk is full, or refuses; names the file.
    """

    def __init__(self, path: Path):
        self._path = path
        # opened first, made direct then: a file system that cannot would leave the file behind
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._set_direct(True)
        self._block = mmap.mmap(-1, _BLOCK)  # aligned to pages, as direct writes must be
        self._held = 0

    def write(self, data: memoryview) -> None:
        """Append bytes."""
        while len(data):
            piece = data[: _BLOCK - self._held]
            self._block[self._held : self._held + len(piece)] = piece
            self._held += len(piece)
            data = data[len(piece) :]
            if self._held == _BLOCK:
                self._flush()

    def finish(self) -> None:
        """Write what is left; the end of a file fills no sector and goes through the cache."""
        self._set_direct(False)
        self._flush()

    def close(self) -> None:
        """Give the file back; without `finish` its end is missing."""
        os.close(self._file)
        self._block.close()

    def _flush(self) -> None:
        done = 0
        try:
            with memoryview(self._block) as block:
                while done < self._held:
                    done += os.write(self._file, block[done : self._held])
        except OSError as error:
            error.filename = str(self._path)
            raise
        self._held = 0

    def _set_direct(self, wanted: bool) -> None:
        direct = getattr(os, "O_DIRECT", 0)
        flags = fcntl.fcntl(self._file, fcntl.F_GETFL)
        with suppress(OSError):  # no direct writes here: the page cache it is
            fcntl.fcntl(self._file, fcntl.F_SETFL, flags | direct if wanted else flags & ~direct)
