"""One file that appears under its name only when complete.

The sibling `.NAME.partial` is locked by its writer (`flock`, which dies with it) and fsynced; one
rename shows it. What a killed writer left behind is overwritten by the next.
"""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from star_elastic.folder.atomic import siblings, sync


@contextmanager
def atomic_file(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """An empty file that takes `target`'s name once the block ends without an error.

    Raises:
        FileExistsError: `target` is there already and `overwrite` is false.
        IsADirectoryError: it is a folder.
        BlockingIOError: another process is writing `target`.
    """
    target = target.resolve()
    _refuse(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary, _ = siblings(target)
    held = _hold(temporary, target)
    try:
        yield temporary
        os.fsync(held)
        _refuse(target, overwrite)
        temporary.replace(target)
        sync(target.parent)
    finally:
        if is_same(held, temporary):  # by now another writer's may stand under its name
            temporary.unlink()
        os.close(held)


def _refuse(target: Path, overwrite: bool) -> None:
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "a folder; name the file to write", str(target))
    if os.path.lexists(target) and not overwrite:
        message = "exists already; remove it or choose another name"
        raise FileExistsError(errno.EEXIST, message, str(target))


def _hold(temporary: Path, target: Path) -> int:
    """A locked descriptor of the file that is under this name now, emptied."""
    while True:
        held = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(held)
            message = "another process is writing this file"
            raise BlockingIOError(errno.EWOULDBLOCK, message, str(target)) from None
        if is_same(held, temporary):
            os.ftruncate(held, 0)
            return held
        os.close(held)  # its writer finished between our two calls


def is_same(held: int, path: Path) -> bool:
    """Does a name still stand for the file of a descriptor?"""
    try:
        return os.path.samestat(os.fstat(held), os.lstat(path))
    except OSError:
        return False
