"""Sharded safetensors, written front to back: the headers are known before the first byte."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from star_elastic.folder.atomic import write_json
from star_elastic.folder.header import Spec, header_bytes
from star_elastic.folder.index import INDEX, WEIGHTS
from star_elastic.folder.output import Output


class Shards:
    """Weight files of at most `max_shard_size` bytes of tensors, and their index; use with `with`.

    A tensor larger than that has a file of its own. `write` takes the tensors' bytes in the order
    of the specs, in pieces of any length. `digested` files have their SHA-256 in `digests` after
    leaving, of the bytes as they were written: no file is read again for it. One file alone has an
    index if it is `indexed`: where other safetensors are beside it, engines take them for weights.

    Raises:
        ValueError: on leaving, bytes missing.
        OSError: the disk is full, or refuses; names the file.
    """

    def __init__(
        self,
        folder: Path,
        specs: Sequence[Spec],
        max_shard_size: int = 5 * 10**9,
        digested: bool = False,
        indexed: bool = False,
    ):
        self.folder = folder
        self.digests: dict[str, str] = {}
        self._digested = digested
        self._indexed = indexed
        self._hash = hashlib.sha256()
        self._shards = _filled(specs, max_shard_size)
        self.files = _names(len(self._shards))
        self._number = -1
        self._file: Output | None = None
        self._left = 0

    def __enter__(self) -> "Shards":
        self._next()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self._finish()
        finally:
            self._close()

    def write(self, data: memoryview) -> None:
        """Append bytes of the tensors, in order."""
        while len(data):
            self._roll()
            piece = data[: self._left]
            self._put(piece)
            self._left -= len(piece)
            data = data[len(piece) :]

    def _finish(self) -> None:
        self._roll()
        if self._left or self._number < len(self.files) - 1:
            where = self.folder / self.files[self._number]
            raise ValueError(f"{where}: {self._left} bytes were not written")
        self._end()
        if self._indexed or len(self.files) > 1:
            self._write_index()

    def _roll(self) -> None:
        """Go on to the next file while this one is full."""
        while not self._left and self._number < len(self.files) - 1:
            self._next()

    def _put(self, data: memoryview) -> None:
        assert self._file is not None
        self._file.write(data)
        if self._digested:
            self._hash.update(data)

    def _end(self) -> None:
        """The file at hand is complete."""
        if self._file is not None:
            self._file.finish()
            if self._digested:
                self.digests[self.files[self._number]] = f"sha256:{self._hash.hexdigest()}"
                self._hash = hashlib.sha256()

    def _next(self) -> None:
        self._end()
        self._close()
        self._number += 1
        shard = self._shards[self._number]
        self._file = Output(self.folder / self.files[self._number])
        self._put(memoryview(header_bytes(shard)))
        self._left = sum(spec.bytes for spec in shard)

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write_index(self) -> None:
        total = sum(spec.bytes for shard in self._shards for spec in shard)
        weight_map = {
            spec.name: file
            for file, shard in zip(self.files, self._shards, strict=True)
            for spec in shard
        }
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(self.folder / INDEX, index)


def _filled(specs: Sequence[Spec], max_shard_size: int) -> list[list[Spec]]:
    shards: list[list[Spec]] = [[]]
    held = 0
    for spec in specs:
        if shards[-1] and held + spec.bytes > max_shard_size:
            shards.append([])
            held = 0
        shards[-1].append(spec)
        held += spec.bytes
    return shards


def _names(count: int) -> list[str]:
    files = [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    return [WEIGHTS] if count == 1 else files
