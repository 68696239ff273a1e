"""Files of a packed folder, on this disk and what their digests say: fetched once, resumed, locked.

A remote folder gets a folder in the cache, named after its manifest's digest: the same manifest is
the same content, wherever it came from, and a new one never mixes with an old one. A file has its
name there only once it is whole and verified; until then it is `.NAME.partial`, which one process
at a time may hold, and which the next one goes on with.
"""

import fcntl
import hashlib
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from star_elastic.folder import CheckpointError, check_room, digest, is_same, read_bytes, sync
from star_elastic.rings.manifest import MANIFEST, MAX_MANIFEST, Held, Manifest, read_manifest
from star_elastic.rings.transports import Hub, Transport, TransportError, transport_of

Progress = Callable[[int], None]
_TRIES = 5  # in a row without a byte of progress
Found = TypeVar("Found")
_PAUSE = 0.2  # seconds before the second try; doubled each time


@dataclass(frozen=True)
class Packed:
    """A packed folder, or the cache's copy of as much of it as was asked for."""

    source: str
    manifest: Manifest
    folder: Path
    transport: Transport | None  # None: the folder itself is the source

    def missing(self, paths: Sequence[str]) -> list[str]:
        """Those of some files that are still to be fetched."""
        if self.transport is None:
            return []
        return [path for path in paths if not (self.folder / path).is_file()]

    def get(self, paths: Sequence[str], progress: Progress | None = None) -> None:
        """Have these files here, each the one that the manifest tells of.

        Args:
            progress: hears of every bunch of bytes, fetched or read from this disk.

        Raises:
            CheckpointError: naming a file that cannot be had, or that is another.
            OSError: the disk is full.
        """
        missing = self.missing(paths)
        if missing:
            check_room(self.folder / MANIFEST, self.manifest.bytes(missing))
        for path in paths:
            if path not in missing and self._is_sound(path, progress):
                continue
            assert self.transport is not None
            _fetch(self, path, progress)

    def _is_sound(self, path: str, progress: Progress | None) -> bool:
        """Is a file that is here the right one? A spoiled one of the cache is thrown away."""
        file, held = self.folder / path, self.manifest.files[path]
        why = _difference(file, held, progress)
        if why and self.transport is None:
            raise CheckpointError(f"{file}: {why}")
        if why:
            file.unlink(missing_ok=True)
        return not why


def open_packed(source: str | Path, cache: str | Path | None = None) -> Packed:
    """A packed folder: here, under a URL, or in a repository of the hub.

    Args:
        cache: where remote files are kept; by default `$XDG_CACHE_HOME/star-elastic/rings`.

    Raises:
        CheckpointError: no manifest, or not one; nothing that can be reached.
    """
    if os.path.lexists(source):
        folder = Path(source)
        data = read_bytes(folder, MANIFEST, MAX_MANIFEST)
        return Packed(str(source), read_manifest(data, str(folder / MANIFEST)), folder, None)
    transport = transport_of(str(source))
    where = str(source).partition("?")[0].rstrip("/")  # a query may hold a secret: not for errors
    data = _retry(f"{where}/{MANIFEST}", lambda: _small(transport, MANIFEST))
    manifest = read_manifest(data, f"{where}/{MANIFEST}")
    folder = Path(cache or _default_cache()) / hashlib.sha256(data).hexdigest()[:32]
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / MANIFEST).is_file():
        partial = folder / f".{MANIFEST}.{uuid.uuid4().hex}.partial"  # threads fetch side by side
        partial.write_bytes(data)
        partial.replace(folder / MANIFEST)
    return Packed(where, manifest, folder, transport)


def _fetch(packed: Packed, path: str, progress: Progress | None) -> None:
    """Download one file to its place, going on where another try stopped."""
    file, held = packed.folder / path, packed.manifest.files[path]
    file.parent.mkdir(exist_ok=True)
    where = f"{packed.source}/{path}"
    with _partial(file) as partial:
        if partial is None:  # another process had it meanwhile
            return
        if isinstance(packed.transport, Hub) and _link(where, packed.transport, path, file):
            partial.unlink()
            why = _difference(file, held, progress)
            if why:
                file.unlink()
                raise CheckpointError(f"{where}: {why}")
            return
        old = partial.stat().st_size
        _retry(where, lambda: _download(packed, path, partial, held, progress))
        if old and _difference(partial, held, None):  # what was left of another try is to blame
            os.truncate(partial, 0)
            _retry(where, lambda: _download(packed, path, partial, held, progress))
        if why := _difference(partial, held, None):
            partial.unlink()
            raise CheckpointError(f"{where}: {why}")
        sync(partial)
        partial.replace(file)


def _link(where: str, hub: Hub, path: str, file: Path) -> bool:
    """A second name for the hub client's own copy, where its cache is on the same disk."""
    there = _retry(where, lambda: hub.local(path))
    try:
        os.link(there, file)
    except OSError:
        return False
    return True


def _download(
    packed: Packed, path: str, partial: Path, held: Held, progress: Progress | None
) -> int:
    """Append to a partial file until it is whole; the number of bytes it got this time.

    Raises:
        TransportError: it is not whole yet; `held` bytes are never exceeded.
    """
    assert packed.transport is not None
    start = partial.stat().st_size
    if start > held.bytes:
        os.truncate(partial, 0)
        start = 0
    if start == held.bytes:
        return 0
    got = 0
    try:
        with (
            packed.transport.open(path, start) as (position, chunks),
            partial.open("r+b", buffering=0) as output,
        ):
            output.truncate(position)
            output.seek(position)
            for chunk in chunks:
                if position + len(chunk) > held.bytes:
                    raise TransportError(f"has more than {held.bytes} bytes", True)
                output.write(chunk)
                position, got = position + len(chunk), got + len(chunk)
                if progress is not None:
                    progress(len(chunk))
        if position < held.bytes:
            raise TransportError(f"ended at byte {position} of {held.bytes}", False)
    except TransportError as error:
        if got and not error.lasting:
            raise _Progressed(str(error), False) from None
        raise
    return got


class _Progressed(TransportError):
    """Cut off, but not before some bytes came."""


def _retry(where: str, ask: Callable[[], Found]) -> Found:
    """Ask until it is there, or until nothing has come for several times."""
    tries = 0
    while True:
        try:
            return ask()
        except TransportError as error:
            tries = 1 if isinstance(error, _Progressed) else tries + 1
            if error.lasting or tries >= _TRIES:
                raise CheckpointError(f"{where}: {error}") from None
            time.sleep(_PAUSE * 2 ** (tries - 1))


def _small(transport: Transport, path: str) -> bytes:
    data = b""
    with transport.open(path, 0) as (_, chunks):
        for chunk in chunks:
            data += chunk
            if len(data) > MAX_MANIFEST:
                raise TransportError(f"more than {MAX_MANIFEST} bytes", True)
    return data


def _difference(file: Path, held: Held, progress: Progress | None) -> str | None:
    """What makes a file another than the manifest tells of."""
    if not file.is_file():
        return "no such file"
    if (size := file.stat().st_size) != held.bytes:
        return f"{size} bytes; {MANIFEST} says {held.bytes}"
    if digest(file, progress) != held.sha256:
        return f"sha256 differs from {MANIFEST}"
    return None


@contextmanager
def _partial(file: Path) -> Iterator[Path | None]:
    """The partial file, locked; None once the file itself is there."""
    partial = file.with_name(f".{file.name}.partial")
    while True:
        held = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(held, fcntl.LOCK_EX)
            if is_same(held, partial):
                if file.is_file():
                    partial.unlink()
                yield None if file.is_file() else partial
                return
        finally:
            os.close(held)


def _default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "star-elastic/rings"
