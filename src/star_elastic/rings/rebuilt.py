"""The parent's weight files again: their own headers, the same tensors, and the same digests."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from star_elastic.folder import CheckpointError
from star_elastic.folder.output import Output
from star_elastic.rings.manifest import MANIFEST, Original


class Rebuilt:
    """Files whose headers and sizes are known; use with `with`.

    `write` takes the bytes of all tensors, file by file in the order of the headers.

    Raises:
        CheckpointError: a file that does not come out as the one that was packed.
        OSError: the disk is full, or refuses; names the file.
    """

    def __init__(
        self, folder: Path, headers: Mapping[str, bytes], originals: Mapping[str, Original]
    ):
        self._folder = folder
        self._headers = headers
        self._originals = originals
        self._waiting = list(headers)
        self._file: Output | None = None
        self._name = ""
        self._left = 0
        self._digest = hashlib.sha256()

    def __enter__(self) -> "Rebuilt":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            while error is None and (self._waiting or self._file is not None):
                self._roll()
        finally:
            self._close()

    def write(self, data: memoryview) -> None:
        """Append bytes of the tensors, in order."""
        while len(data):
            while not self._left:
                self._roll()
            piece = data[: self._left]
            self._put(piece)
            self._left -= len(piece)
            data = data[len(piece) :]

    def _put(self, data: memoryview) -> None:
        assert self._file is not None
        self._file.write(data)
        self._digest.update(data)

    def _roll(self) -> None:
        """Finish the file at hand, and begin the next one if there is one."""
        assert self._waiting or self._file is not None, "more bytes than the headers tell of"
        if self._file is not None:
            self._file.finish()
            self._close()
            found = "sha256:" + self._digest.hexdigest()
            if self._left or found != self._originals[self._name].sha256:
                what = f"ends {self._left} bytes early" if self._left else "has another sha256"
                where = self._folder / self._name
                raise CheckpointError(f"{where}: rebuilt, it {what} than {MANIFEST} says")
        if self._waiting:
            self._name = self._waiting.pop(0)
            self._file = Output(self._folder / self._name)
            self._digest = hashlib.sha256()
            self._put(memoryview(self._headers[self._name]))
            self._left = self._originals[self._name].bytes - len(self._headers[self._name])

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
