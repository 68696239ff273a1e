"""Raw sums of a calibration on disk: another choice of sizes needs no second pass over the data.

One safetensors file: `LAYER/SYMBOLS/KIND` -> sum (`-` for a layer stands for the whole model), and
`depth`; its metadata tell the criteria, how much was read, and of which parent.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from star_elastic.folder import CheckpointError, one_line
from star_elastic.layout import Layout
from star_elastic.rank.criteria import CRITERIA, Key, Raw, describe, raw_shapes

SCORES = "scores.safetensors"
_FORMAT = "star-elastic scores 1"


def save_scores(path: str | Path, raw: Raw) -> None:
    """Write one file, in one step: readers see all of it or none."""
    path = Path(path)
    tensors = {_name(key): value.contiguous() for key, value in raw.sums.items()}
    if raw.depth is not None:
        tensors["depth"] = raw.depth.contiguous()
    metadata = {
        "format": _FORMAT,
        "criteria": json.dumps(CRITERIA),
        "samples": str(raw.samples),
        "tokens": str(raw.tokens),
        "parent": json.dumps(raw.parent),
    }
    temporary = path.with_name(f".{path.name}.partial")
    save_file(tensors, temporary, metadata=metadata)
    temporary.chmod(0o644)  # safetensors writes for its owner only
    temporary.replace(path)


def load_scores(path: str | Path, layout: Layout) -> Raw:
    """Read the raw sums of this very parent.

    Raises:
        CheckpointError: no such file, not one of scores, of another parent (names the field), a sum
            that is missing or has another shape.
    """
    path = Path(path)
    tensors, metadata = _read(path)
    parent = _check_parent(path, metadata, layout)
    depth = tensors.pop("depth", None)
    shapes = {_name(key): (key, shape) for key, shape in raw_shapes(layout).items()}
    if spare := sorted(tensors.keys() ^ shapes.keys()):
        raise CheckpointError(f"{path}: {spare[0]}: missing, or not of this model")
    sums: dict[Key, Tensor] = {}
    for name, (key, shape) in shapes.items():
        _check_sum(path, name, tensors[name], shape)
        sums[key] = tensors[name]
    if depth is not None and depth.shape[1:] != (len(layout.blocks),):
        raise CheckpointError(f"{path}: depth: shape {tuple(depth.shape)} does not fit the layers")
    try:
        return Raw(sums, int(metadata["samples"]), int(metadata["tokens"]), parent, depth)
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: metadata: {error!r}") from None


def _name(key: Key) -> str:
    layer, symbol, kind = key
    return f"{'-' if layer is None else layer}/{symbol}/{kind}"


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, metadata
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not readable: {one_line(error)}") from None


def _check_parent(path: Path, metadata: dict[str, str], layout: Layout) -> dict[str, Any]:
    if metadata.get("format") != _FORMAT:
        raise CheckpointError(f"{path}: format: {metadata.get('format')!r}, not {_FORMAT!r}")
    try:
        said = dict(json.loads(metadata.get("parent", "")))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: parent: {one_line(error)}") from None
    true = describe(layout)
    for field in (*true, *said):
        if said.get(field) != true.get(field):
            values = f"{said.get(field)!r}, this one has {true.get(field)!r}"
            raise CheckpointError(f"{path}: scores of another parent: {field} is {values}")
    return said


def _check_sum(path: Path, name: str, found: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(found.shape) != shape:
        raise CheckpointError(f"{path}: {name}: shape {tuple(found.shape)}, expected {shape}")
    if not bool(torch.isfinite(found).all()):
        raise CheckpointError(f"{path}: {name}: not all values are finite")
