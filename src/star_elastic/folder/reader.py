"""Bytes of tensors out of a folder's weight files, into buffers that the caller owns."""

import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from star_elastic.folder.header import Stored, read_header, stamp_of
from star_elastic.folder.trust import CheckpointError, one_line, open_inside


class Reader:
    """A folder's weight files, held open; use it with `with`.

    On leaving, it makes sure that no file changed meanwhile. What it read does not stay in the page
    cache, where it would take the place of what others need.

    Raises:
        CheckpointError: a file that is not the one whose header was read, that ends early, that
            the disk refuses to give, or that somebody wrote to meanwhile.
    """

    def __init__(self, folder: Path, stored: Mapping[str, Stored]):
        self.folder = folder
        self._stored = stored
        self._files: dict[str, int] = {}
        self._stamps: dict[str, tuple[int, ...]] = {}

    def __enter__(self) -> "Reader":
        try:
            for file in dict.fromkeys(each.file for each in self._stored.values()):
                self._open(file)
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                for file, descriptor in self._files.items():
                    if stamp_of(descriptor) != self._stamps[file]:
                        raise CheckpointError(f"{self.folder / file}: changed while it was read")
        finally:
            self._close()

    @property
    def names(self) -> list[str]:
        """The tensors, in the order of their bytes."""
        return list(self._stored)

    def fill(self, name: str, offset: int, buffer: memoryview) -> int:
        """Fill a buffer with a tensor's bytes from `offset` on; returns its length."""
        stored, done = self._stored[name], 0
        file = self._files[stored.file]
        try:
            while done < len(buffer):
                position = stored.start + offset + done
                count = os.preadv(file, [buffer[done:]], position)
                if not count:
                    raise EOFError(f"the file ends at byte {position}")
                done += count
            os.posix_fadvise(file, stored.start + offset, done, os.POSIX_FADV_DONTNEED)
        except (OSError, EOFError) as error:
            where = f"{self.folder / stored.file}: {name}"
            raise CheckpointError(f"{where}: cannot be read: {one_line(error)}") from None
        return done

    def _open(self, file: str) -> None:
        descriptor = self._files[file] = open_inside(self.folder, file)
        self._stamps[file] = stamp_of(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        expected = {name: each for name, each in self._stored.items() if each.file == file}
        if read_header(descriptor, file, str(self.folder / file)) != expected:
            raise CheckpointError(f"{self.folder / file}: changed since it was opened")

    def _close(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()
