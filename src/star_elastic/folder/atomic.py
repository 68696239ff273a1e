"""Folders that appear under their name only when complete, whatever happens meanwhile.

Files go to a sibling, `.NAME.partial`, that one process at a time may hold (`flock`, which dies
with its holder). They are fsynced, the sibling is, and one rename shows them all; where a folder is
to be replaced, one exchange (`renameat2`, Linux) puts the new one in its place. What a killed
writer left behind is removed by the next.

Where a file system has no exchange (NFS), the old folder steps aside as `.NAME.old` for the moment
between two renames; if the writer is killed in that moment, the next one puts it back first.
"""

import ctypes
import errno
import fcntl
import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from star_elastic.folder.output import naming, write_file

_AT_FDCWD = -100
_RENAME_NOREPLACE, _RENAME_EXCHANGE = 1, 2


@contextmanager
def atomic_folder(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder that takes `target`'s name once the block ends without an error.

    A folder that is replaced passes on its mode.

    Raises:
        FileExistsError: `target` is there already and `overwrite` is false.
        NotADirectoryError: it is there and no folder.
        BlockingIOError: another process is writing `target`.
        FileNotFoundError: somebody removed the temporary folder.
    """
    target = target.resolve()
    _refuse_existing(target, overwrite)
    _make_parents(target.parent)
    temporary, _ = siblings(target)
    held = [_hold(temporary, target)]
    try:
        _restore(target)
        _refuse_existing(target, overwrite)
        yield temporary
        if not _is_held(temporary, held):
            raise FileNotFoundError(errno.ENOENT, "removed by somebody meanwhile", str(temporary))
        if target.is_dir():
            temporary.chmod(stat.S_IMODE(target.stat().st_mode))
        for path in sorted(temporary.rglob("*")):
            sync(path)
        sync(temporary)
        _refuse_existing(target, overwrite)
        if target.exists():
            # it is removed under the temporary name, which the next writer must not take before
            held.append(_lock(target, target))
            _exchange(temporary, target)
        elif not _rename(temporary, target, _RENAME_NOREPLACE):
            temporary.rename(target)
        sync(target.parent)
    finally:
        _remove(temporary, held)  # half a folder, or the one that was replaced
        for each in held:
            _release(each)


def siblings(target: Path) -> tuple[Path, Path]:
    """Where `atomic_folder` writes, and where an old folder may stand for a moment."""
    return target.with_name(f".{target.name}.partial"), target.with_name(f".{target.name}.old")


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


def write_json(path: Path, value: Mapping[str, Any], sort: bool = True) -> None:
    """A new file of JSON as Hugging Face writes it; `sort` its keys, or keep their order."""
    write_file(path, _json_bytes(value, sort))


def replace_json(path: Path, value: Mapping[str, Any], sort: bool = True) -> None:
    """Replace a JSON file in one step; see `write_json` and `replace_file`."""
    replace_file(path, _json_bytes(value, sort))


def replace_file(path: Path, data: bytes) -> None:
    """Replace a file in one step: readers see the old one or the new one."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.unlink(missing_ok=True)  # a killed writer's
    write_file(temporary, data)
    temporary.replace(path)
    sync(path.parent)


def _json_bytes(value: Mapping[str, Any], sort: bool) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=sort) + "\n").encode()


def _refuse_existing(target: Path, overwrite: bool) -> None:
    if overwrite and target.exists() and not target.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "exists and is no folder", str(target))
    if os.path.lexists(target) and not overwrite:
        raise FileExistsError(
            errno.EEXIST, "exists already; remove it or choose another folder", str(target)
        )


def _make_parents(folder: Path) -> None:
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    for each in reversed(missing):
        each.mkdir(exist_ok=True)
        sync(each.parent)


def _hold(temporary: Path, target: Path) -> int:
    """A lock on the temporary folder, which is new and empty."""
    while True:
        made = _make(temporary)
        try:
            held = _lock(temporary, target)
        except FileNotFoundError:  # another writer finished in between, or removed a killed one's
            continue
        except BlockingIOError:
            raise
        except OSError:
            if made:
                temporary.rmdir()
            raise
        if made:
            return held
        try:
            _open_up(temporary)
            shutil.rmtree(temporary)  # a killed writer's; not used again: its mode may be another
        finally:
            _release(held)


def _make(folder: Path) -> bool:
    """Make a folder; was there none?"""
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    return True


def _lock(folder: Path, target: Path) -> int:
    """A descriptor of a folder, locked until it is released or this process ends.

    Raises:
        FileNotFoundError: there is no such folder, or another one by now.
        BlockingIOError: another process holds it.
    """
    held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        with naming(folder):
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(held), os.lstat(folder)):
            raise FileNotFoundError(errno.ENOENT, "replaced meanwhile", str(folder))
    except BlockingIOError:
        os.close(held)
        raise BlockingIOError(
            errno.EWOULDBLOCK, "another process is writing this folder", str(target)
        ) from None
    except BaseException:
        _release(held)
        raise
    return held


def _release(held: int) -> None:
    """Unlock and close; a process forked meanwhile has the descriptor too, and the lock with it."""
    with suppress(OSError):
        fcntl.flock(held, fcntl.LOCK_UN)
    os.close(held)


def _remove(folder: Path, held: Sequence[int]) -> None:
    """Remove a folder that we hold: by now another writer's may stand under its name."""
    if _is_held(folder, held):
        _open_up(folder)
        shutil.rmtree(folder, ignore_errors=True)


def _is_held(folder: Path, held: Sequence[int]) -> bool:
    try:
        found = os.lstat(folder)
    except OSError:
        return False
    return any(os.path.samestat(os.fstat(each), found) for each in held)


def _open_up(folder: Path) -> None:
    """What was read-only can be removed then."""
    with suppress(OSError):
        folder.chmod(stat.S_IRWXU)


def _exchange(temporary: Path, target: Path) -> None:
    if _rename(temporary, target, _RENAME_EXCHANGE):
        return
    _, old = siblings(target)
    try:
        target.rename(old)
        temporary.rename(target)
    finally:
        _restore(target)


def _restore(target: Path) -> None:
    """An old folder that had stepped aside: back to its place, if that is empty, or away."""
    _, old = siblings(target)
    if not old.is_dir():
        return
    if not target.exists():
        old.rename(target)
        return
    _open_up(old)
    shutil.rmtree(old, ignore_errors=True)


def _rename(source: Path, target: Path, flags: int) -> bool:
    """`renameat2`; False where the system or its file system does not have it."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flags) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(target))


def sync(path: Path) -> None:
    """Have a file's content, or a folder's names, on the disk.

    Raises:
        OSError: the disk refuses; names the path.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    with naming(path):
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
