"""SHA-256 of files, as checkpoints carry them."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from star_elastic.folder.trust import CheckpointError, one_line, open_inside

_BLOCK = 4 * 2**20  # bytes


def digest(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """`sha256:...` of a file's bytes; `progress` hears of every block's.

    Raises:
        CheckpointError: it cannot be read; see `open_inside`.
    """
    found = hashlib.sha256()
    with os.fdopen(open_inside(path.parent, path.name), "rb", buffering=0) as file:
        block = bytearray(_BLOCK)
        try:
            while count := file.readinto(block):
                found.update(memoryview(block)[:count])
                if progress is not None:
                    progress(count)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {one_line(error)}") from None
    return "sha256:" + found.hexdigest()
