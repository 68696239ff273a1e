"""Files that nobody vouches for: opened inside their folder only, parsed within bounds."""

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

MAX_JSON = 64 * 2**20  # bytes: an index of a million tensors; more is no config of a model
_MAX_DEPTH = 64  # of lists and maps in one another; configs have five
_PLAIN = re.compile(r"[^/\\:\0]{1,255}")


class CheckpointError(ValueError):
    """A folder that cannot be trusted: one line naming the file, and the tensor or field.

    Names in it come from the folder: what a terminal would obey is escaped.
    """

    def __init__(self, message: str):
        super().__init__(_printable(message))


def one_line(error: BaseException) -> str:
    """What another library had to say, short enough to stand behind a file's name."""
    return _printable(" ".join(str(error)[:1000].split()))[:300] or type(error).__name__


def is_plain(name: str) -> bool:
    """Can this be a file in a folder, on any system, and nothing but that?"""
    return bool(_PLAIN.fullmatch(name)) and name not in (".", "..")


def open_inside(folder: Path, name: str) -> int:
    """A descriptor of a regular file in this very folder, for reading; the caller closes it.

    Symbolic links must stay in the folder; those of a Hugging Face hub cache may go to its blobs.

    Raises:
        CheckpointError: no plain name, no such file, no regular file, a link to elsewhere.
    """
    path = folder / name
    if not is_plain(name):
        raise CheckpointError(f"{folder}: {name!r} is not a file of this folder")
    try:
        real = _inside(path)
        # non-blocking, so that a pipe without a writer is refused and not waited for
        descriptor = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except UnicodeError:  # half a surrogate pair: JSON can write it, no file has it
        raise CheckpointError(f"{folder}: {name!r} is not a file of this folder") from None
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, to pathlib
        raise CheckpointError(f"{path}: cannot be read: {one_line(error)}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{path}: not a regular file")
    return descriptor


def check_links(folder: Path) -> None:
    """Others than we may read a folder's files by name: no link may lead out, no pipe may lurk.

    Raises:
        CheckpointError: naming the link, or what is neither a file nor a folder.
    """
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {one_line(error)}") from None
    for entry in entries:
        try:
            mode = _inside(Path(entry.path)).stat().st_mode
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"{entry.path}: cannot be read: {one_line(error)}") from None
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise CheckpointError(f"{entry.path}: not a regular file")


def read_bytes(folder: Path, name: str, limit: int = MAX_JSON) -> bytes:
    """The content of a file in this very folder.

    Raises:
        CheckpointError: see `open_inside`; more bytes than `limit`.
    """
    with os.fdopen(open_inside(folder, name), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise CheckpointError(f"{folder / name}: {size} bytes; at most {limit} are read")
        try:
            return file.read(limit)
        except OSError as error:
            raise CheckpointError(f"{folder / name}: cannot be read: {one_line(error)}") from None


def read_json(path: Path, limit: int = MAX_JSON) -> dict[str, Any]:
    """A JSON object of at most `limit` bytes.

    Raises:
        CheckpointError: missing, unreadable, not an object, a key twice; see `parse_json`.
    """
    text = read_bytes(path.parent, path.name, limit)
    try:
        value = parse_json(text)
        _check_depth(value)
        return value
    except ValueError as error:
        raise CheckpointError(f"{path}: not readable as JSON: {one_line(error)}") from None


def parse_json(text: bytes) -> dict[str, Any]:
    """A JSON object: UTF-8, no key twice. Infinity passes, as configs of Mamba models have it bare.

    Raises:
        ValueError: saying what is wrong.
    """
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except RecursionError:
        raise ValueError("nested too deep") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def _check_depth(value: Any) -> None:
    """What is copied, compared and written later must not exhaust the stack there."""
    level = [value]
    for _ in range(_MAX_DEPTH):
        inner = [each.values() if isinstance(each, dict) else each for each in level]
        level = [each for several in inner for each in several if isinstance(each, dict | list)]
        if not level:
            return
    raise ValueError("nested too deep")


def _printable(text: str) -> str:
    """Text with line breaks, escapes and halves of surrogate pairs spelled out."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _inside(path: Path) -> Path:
    """Where a file of a folder really is."""
    if not path.is_symlink():
        return path
    real, folder = path.resolve(strict=True), path.parent.resolve(strict=True)
    allowed = [folder]
    if folder.parent.name == "snapshots":  # a hub cache: snapshots/REVISION/file -> blobs/DIGEST
        repository = folder.parent.parent
        allowed.append(repository / "blobs")
        # which may be a link itself, to the one store of all repositories: blobs/xx/xxDIGEST
        allowed.append(repository.parent / "blobs" / real.name[:2])
    if real.parent not in allowed:
        raise CheckpointError(f"{path}: a link out of its folder")
    return real


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"duplicate key {twice!r}")
    return found
