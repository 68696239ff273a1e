"""One file, written front to back in large aligned blocks, and on the disk when it is finished."""

import errno
import fcntl
import mmap
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from star_elastic.folder.trust import CheckpointError, one_line, open_inside

_BLOCK = 8 * 2**20  # bytes; a multiple of every disk's sector
_DIRECT = getattr(os, "O_DIRECT", 0)


class Output:
    """A new file, written past the page cache where its file system can (`O_DIRECT`).

    A copy larger than the memory to spare would throw everything else out of the page cache, and
    filling the cache costs more than writing to a fast disk does.

    Raises:
        OSError: the file exists, the disk is full, or refuses; names the file.
    """

    def __init__(self, path: Path, mode: int = 0o666):
        self._path = path
        self._block = mmap.mmap(-1, _BLOCK)  # aligned to pages, as direct writes must be
        self._held = 0
        # opened first, made direct then: a file system that cannot would leave the file behind
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        self._set_direct(True)

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
        with naming(self._path):  # what the cache could not write, this descriptor hears of
            os.fsync(self._file)

    def close(self) -> None:
        """Give the file back; without `finish` its end is missing."""
        with naming(self._path):
            os.close(self._file)
        self._block.close()

    def _flush(self) -> None:
        done = 0
        with naming(self._path):
            while done < self._held:
                done += self._put(done)
        self._held = 0

    def _put(self, start: int) -> int:
        with memoryview(self._block)[start : self._held] as data:
            try:
                return os.write(self._file, data)
            except OSError as error:
                # not aligned as this disk wants it, or no longer after a write that fell short
                if error.errno != errno.EINVAL or not self._set_direct(False):
                    raise
            return os.write(self._file, data)

    def _set_direct(self, wanted: bool) -> bool:
        """Write past the page cache from now on, or no longer; was that a change?"""
        flags = fcntl.fcntl(self._file, fcntl.F_GETFL)
        changed = flags | _DIRECT if wanted else flags & ~_DIRECT
        with suppress(OSError):  # no direct writes here: the page cache it is
            fcntl.fcntl(self._file, fcntl.F_SETFL, changed)
        return changed != flags


def write_file(path: Path, data: bytes) -> None:
    """A new file of these bytes; see `Output`."""
    with _writing(path, 0o666) as output:
        output.write(memoryview(data))


def copy_file(folder: Path, name: str, path: Path) -> None:
    """A file of a folder as a new one, with the mode that `cp` would give it; see `Output`.

    Raises:
        CheckpointError: it cannot be read; see `open_inside`.
    """
    with os.fdopen(open_inside(folder, name), "rb", buffering=0) as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o777
        with _writing(path, mode) as output:
            while True:
                try:
                    data = file.read(_BLOCK)
                except OSError as error:
                    raise CheckpointError(
                        f"{folder / name}: cannot be read: {one_line(error)}"
                    ) from None
                if not data:
                    break
                output.write(memoryview(data))


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of descriptors do not say which file; these do."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def _writing(path: Path, mode: int) -> Iterator[Output]:
    output = Output(path, mode)
    try:
        yield output
        output.finish()
    finally:
        output.close()
