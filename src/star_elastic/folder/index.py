"""Where each tensor of a folder is: one weight file, or several and their index."""

import os
from collections.abc import Iterable
from pathlib import Path

from star_elastic.folder.header import Stored, read_header
from star_elastic.folder.trust import CheckpointError, open_inside, read_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor in a folder's safetensors files, from their headers alone.

    Raises:
        CheckpointError: no weights, a malformed header or index, an index that disagrees with the
            files, one tensor in two files.
    """
    if not os.path.lexists(folder / INDEX):
        if not os.path.lexists(folder / WEIGHTS):
            raise CheckpointError(
                f"{folder}: holds neither {WEIGHTS} nor {INDEX} (only safetensors are read)"
            )
        return _headers(folder, [WEIGHTS])
    weight_map, total = _index(folder / INDEX)
    tensors = _headers(folder, sorted(set(weight_map.values())))
    for name in sorted(weight_map.keys() ^ tensors.keys()):
        there = "index" if name in weight_map else "files"
        raise CheckpointError(f"{folder / INDEX}: {name[:255]!r}: only in the {there}")
    for name, stored in tensors.items():
        if weight_map[name] != stored.file:
            raise CheckpointError(f"{folder / INDEX}: {name}: is in {stored.file}")
    held = sum(stored.end - stored.start for stored in tensors.values())
    if total is not None and total != held:
        raise CheckpointError(f"{folder / INDEX}: metadata.total_size {total}, files hold {held}")
    return tensors


def _index(path: Path) -> tuple[dict[str, str], int | None]:
    """The weight map, and the total of bytes that the index tells, if it does."""
    index = read_json(path)
    weight_map, metadata = index.get("weight_map"), index.get("metadata", {})
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise CheckpointError(f"{path}: weight_map: not a map from tensor to file name")
    for name, file in weight_map.items():
        if not file.endswith(".safetensors") or Path(file).name != file or "\\" in file:
            raise CheckpointError(
                f"{path}: {name[:255]!r}: {file[:255]!r} is not a weight file of this folder"
            )
    total = metadata.get("total_size") if isinstance(metadata, dict) else metadata
    if total is not None and type(total) not in (int, float):
        raise CheckpointError(f"{path}: metadata.total_size: not a number of bytes")
    return weight_map, total


def _headers(folder: Path, files: Iterable[str]) -> dict[str, Stored]:
    tensors: dict[str, Stored] = {}
    for file in files:
        descriptor = open_inside(folder, file)
        try:
            found = read_header(descriptor, file, str(folder / file))
        finally:
            os.close(descriptor)
        for name in found.keys() & tensors.keys():
            raise CheckpointError(f"{folder / file}: {name}: also in {tensors[name].file}")
        tensors |= found
    return tensors
