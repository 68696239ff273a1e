"""Folders that appear under their name only when complete, whatever happens meanwhile.

Files go to a sibling, `.NAME.partial`, that one process at a time may hold (`flock`, which dies
with its holder). They are fsynced, the sibling is, and one rename shows them all; where a folder is
to be replaced, one exchange (`renameat2`, Linux) puts the new one in its place. What a killed
writer left behind is removed by the next.
"""

import ctypes
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_AT_FDCWD = -100
_RENAME_NOREPLACE, _RENAME_EXCHANGE = 1, 2


@contextmanager
def atomic_folder(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder that takes `target`'s name once the block ends without an error.

    Raises:
        FileExistsError: `target` is there already and `overwrite` is false.
        NotADirectoryError: it is there and no folder.
        BlockingIOError: another process is writing `target`.
    """
    target = target.resolve()
    _refuse_existing(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.partial")
    held = _hold(temporary, target)
    try:
        _empty(temporary)
        yield temporary
        for path in sorted(temporary.rglob("*")):
            _fsync(path)
        _fsync(temporary)
        _show(temporary, target, overwrite)
        _fsync(target.parent)
        shutil.rmtree(temporary, ignore_errors=True)  # the folder that was replaced
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        os.close(held)


def check_room(target: Path, needed: int) -> None:
    """Refuse before the first byte what the disk cannot hold.

    Raises:
        OSError: fewer bytes free than needed; says both.
    """
    there = next(path for path in target.resolve().parents if path.is_dir())
    free = shutil.disk_usage(there).free
    if free < needed:
        message = f"{needed:,} bytes are needed and {free:,} are free"
        raise OSError(errno.ENOSPC, message, str(target))


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """JSON as Hugging Face writes it."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", "utf-8")


def replace_json(path: Path, value: Mapping[str, Any]) -> None:
    """Replace a JSON file in one step: readers see the old one or the new one."""
    temporary = path.with_name(f".{path.name}.partial")
    write_json(temporary, value)
    _fsync(temporary)
    temporary.replace(path)
    _fsync(path.parent)


def _refuse_existing(target: Path, overwrite: bool) -> None:
    if overwrite and target.exists() and not target.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "exists and is no folder", str(target))
    if os.path.lexists(target) and not overwrite:
        raise FileExistsError(
            errno.EEXIST, "exists already; remove it or choose another folder", str(target)
        )


def _hold(temporary: Path, target: Path) -> int:
    """A lock on the temporary folder, which is made if need be; it ends with this process."""
    while True:
        temporary.mkdir(exist_ok=True)
        try:
            held = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:  # another writer finished in between
            continue
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(held), os.lstat(temporary)):
                return held
        except BlockingIOError:
            os.close(held)
            raise BlockingIOError(
                errno.EWOULDBLOCK, "another process is writing this folder", str(target)
            ) from None
        except FileNotFoundError:
            pass
        os.close(held)  # locked, but it has been renamed since: look again


def _empty(folder: Path) -> None:
    for entry in list(os.scandir(folder)):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            os.unlink(entry.path)


def _show(temporary: Path, target: Path, overwrite: bool) -> None:
    """Give the folder its name; a folder that stood there is under the temporary one then."""
    if overwrite and target.exists():
        if not _rename(temporary, target, _RENAME_EXCHANGE):
            old = target.with_name(f".{target.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
            temporary.rename(target)
            old.rename(temporary)
        return
    _refuse_existing(target, overwrite)
    if not _rename(temporary, target, _RENAME_NOREPLACE):
        temporary.rename(target)


def _rename(source: Path, target: Path, flags: int) -> bool:
    """`renameat2`; False where the system or its file system does not have it."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flags) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS):
        return False
    raise OSError(number, os.strerror(number), str(target))


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
