"""Where each tensor of a folder is: one weight file, or several and their index."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from star_elastic.folder.header import Stored, read_header, shown
from star_elastic.folder.trust import (
    CheckpointError,
    is_plain,
    one_line,
    open_inside,
    parse_json,
    read_bytes,
)

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_TENSORS = 2**18  # of a model: what is named one by one; a trillion parameters have 2**17


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
    text = read_bytes(folder, INDEX)
    try:
        places, total = parse_index(text)
    except ValueError as error:
        raise CheckpointError(f"{folder / INDEX}: {one_line(error)}") from None
    if os.path.lexists(folder / WEIGHTS) and {*places.values()} != {WEIGHTS}:
        # stock classes would read the one file, and not those that the index names
        raise CheckpointError(f"{folder / INDEX}: {WEIGHTS} is there too, and is none of its files")
    tensors = _headers(folder, sorted(set(places.values())))
    try:
        check_index(places, total, tensors)
    except ValueError as error:
        raise CheckpointError(f"{folder / INDEX}: {one_line(error)}") from None
    return tensors


def parse_index(text: bytes) -> tuple[dict[str, str], int | None]:
    """The file of each tensor, and the total of bytes, if the index tells it.

    Raises:
        ValueError: naming the tensor or field, and what is wrong with it.
    """
    try:
        index = parse_json(text)
    except ValueError as error:
        raise ValueError(f"not readable as JSON: {error}") from None
    places, metadata = index.get("weight_map"), index.get("metadata", {})
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise ValueError("weight_map: not a map from tensor to file name")
    for name, file in places.items():
        if not is_plain(file) or not file.endswith(".safetensors"):
            raise ValueError(f"{shown(name)}: {file[:80]!r} is not a weight file of this folder")
    if not isinstance(metadata, dict):
        raise ValueError("metadata: not a map")
    total = metadata.get("total_size")
    # a float is what some tools write; others write nothing
    if total is not None and (type(total) not in (int, float) or total != total // 1 or total < 0):
        raise ValueError("metadata.total_size: not a number of bytes")
    return places, None if total is None else int(total)


def check_index(
    places: Mapping[str, str], total: int | None, tensors: Mapping[str, Stored]
) -> None:
    """Hold an index against the files that it names.

    Raises:
        ValueError: naming the tensor that is elsewhere, or the total that is another.
    """
    for name in sorted(places.keys() ^ tensors.keys()):
        there = "index" if name in places else "files"
        raise ValueError(f"{shown(name)}: only in the {there}")
    for name, stored in tensors.items():
        if places[name] != stored.file:
            raise ValueError(f"{name}: is in {stored.file}")
    held = sum(stored.end - stored.start for stored in tensors.values())
    if total is not None and total != held:
        raise ValueError(f"metadata.total_size: {str(total)[:20]}, the files hold {held}")


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
        if len(tensors) > MAX_TENSORS:
            raise CheckpointError(f"{folder / file}: brings more than {MAX_TENSORS} tensors")
    return tensors
