"""Hub ids wherever a folder does: downloads that resume, and are what their digests say.

The cache of the Hugging Face hub names every large file by its SHA-256, but nobody holds it against
the bytes that arrived. Here that is done once a file, and an empty file remembers it: its name has
the digest and what the file looked like, so that a file that changed since is checked again.
Where the cache has no links (`HF_HUB_DISABLE_SYMLINKS`) its names tell no digest to check.
"""

import os
import re
from contextlib import suppress
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import tqdm, validate_repo_id

from star_elastic.folder import CheckpointError, digest, one_line

_WANTED = (
    "*.json",
    "*.safetensors",
    "tokenizer*",
    "chat_template*",
    "vocab.*",
    "merges.txt",
    "LICENSE*",
    "README.md",  # which tells the licence
)
_UNWANTED = ("*/*", "*.py", "*.bin", "*.pt", "*.pth", "*.pkl")  # whatever their names begin with
_SHA256 = re.compile(r"[0-9a-f]{64}")


def local(path: str | Path) -> Path:
    """The folder itself, or where a repository of the Hugging Face hub has been downloaded to.

    Args:
        path: a folder, or `NAMESPACE/NAME`, or `NAMESPACE/NAME@REVISION`.

    Raises:
        CheckpointError: neither; or a file that is not what the hub says.
    """
    if Path(path).exists():
        return Path(path)
    name, _, revision = str(path).partition("@")
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise CheckpointError(
            f"{path}: no such folder (neither a folder nor an id of the hub, NAMESPACE/NAME)"
        ) from None
    try:
        folder = Path(
            snapshot_download(
                name,
                revision=revision or None,
                allow_patterns=[*_WANTED],
                ignore_patterns=[*_UNWANTED],
            )
        )
    except Exception as error:  # its own, the transport's, the disk's
        raise CheckpointError(f"{path}: no such folder, and {_reason(error)}") from None
    _check(folder)
    return folder


def repository(folder: Path) -> str | None:
    """Whose download a folder is, `NAMESPACE/NAME`; None if it is not in a cache of the hub."""
    snapshots = folder.resolve().parent
    if snapshots.name != "snapshots" or not (snapshots.parent / "blobs").is_dir():
        return None
    return "/".join(snapshots.parent.name.split("--")[1:])


def known_digest(path: Path) -> str | None:
    """`sha256:...` of a file in the hub's cache, if it was checked and has not changed since."""
    named = _named(path)
    return f"sha256:{named}" if named and _marker(path, named).exists() else None


def _check(folder: Path) -> None:
    """Hold the files that nobody has checked yet against their names.

    Raises:
        CheckpointError: naming the file and both digests.
    """
    unchecked = [
        (path, named)
        for path in sorted(folder.iterdir())
        if (named := _named(path)) and not _marker(path, named).exists()
    ]
    if not unchecked:
        return
    total = sum(path.stat().st_size for path, _ in unchecked)
    with tqdm(total=total, unit="B", unit_scale=True, desc="Checking SHA-256") as bar:
        for path, named in unchecked:
            marker = _marker(path, named)
            found = digest(path, lambda count: _move(bar, count)).removeprefix("sha256:")
            if found != named:
                raise CheckpointError(
                    f"{path}: its SHA-256 is {found}, the hub says {named}; "
                    f"remove {path.resolve()} to download it again"
                )
            if _marker(path, named) == marker:  # it did not change meanwhile
                _remember(path, marker)


def _move(bar: tqdm, count: int) -> None:
    bar.update(count)


def _remember(path: Path, marker: Path) -> None:
    """Note that a file has been checked; not being able to costs another check only."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # else a crash might lose the bytes and keep the note
        finally:
            os.close(descriptor)
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()


def _named(path: Path) -> str | None:
    """The SHA-256 that the cache knows a file by. Small files have git's own kind of digest."""
    if not path.is_symlink():
        return None
    name = Path(os.readlink(path)).name  # one step: a blob may itself be a link to a shared one
    return name if _SHA256.fullmatch(name) else None


def _marker(path: Path, named: str) -> Path:
    """The empty file that says that this very file has been checked."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    found = path.stat()
    stamp = f"{found.st_size}-{found.st_mtime_ns}-{found.st_ino}"
    return cache / "star-elastic" / "verified" / f"{named}-{stamp}"


def _reason(error: Exception) -> str:
    """Why there was no download, in words for the end of a line."""
    match error:
        case GatedRepoError():
            return "the repository is gated: accept its terms on the hub, then `hf auth login`"
        case RepositoryNotFoundError():
            return "the hub has no such repository (a private one wants `hf auth login`)"
        case RevisionNotFoundError():
            return "the repository has no such revision"
        case LocalEntryNotFoundError():
            held = "only in part" if getattr(error, "snapshot_path", None) else "not"
            cause = (
                one_line(error.__cause__) if isinstance(error.__cause__, Exception) else "offline"
            )
            return f"the repository is {held} in the cache and the hub is out of reach: {cause}"
    return f"the hub did not give it: {one_line(error)}"
