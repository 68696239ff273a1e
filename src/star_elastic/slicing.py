"""Sizes as stock folders of their own, cut out of an elastic checkpoint with no training.

No model is built and no tensor is held whole: bytes go from file to file through one buffer, and
several sizes are cut in one pass over the parent.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from star_elastic import card, configs, fewer, packed
from star_elastic.checkpoint import QUANTIZATION, Checkpoint, copy_companions
from star_elastic.corner import Corner, corner_of, total, union
from star_elastic.dtypes import STORED, STORED_ITEMSIZE
from star_elastic.fewer import Convert
from star_elastic.folder import (
    Reader,
    Shards,
    Spec,
    atomic_folder,
    check_room,
    read_json,
    siblings,
    write_file,
    write_json,
)
from star_elastic.layout import Weight
from star_elastic.shapes import Sizes
from star_elastic.submodel import Fields, Submodel, check_fields, submodel
from star_elastic.symbols import DEPTH
from star_elastic.transfer import transfer

Progress = Callable[[int], None]  # hears of every bunch of bytes read
_METADATA = 2**20  # bytes of configs, tokenizer and cards, about


@dataclass(frozen=True)
class Piece:
    """One tensor of a slice: its own name and shape, the parent's tensor, the part of it."""

    name: str
    weight: Weight
    spec: Spec
    corner: Corner
    convert: Convert | None = None  # what becomes of its bytes, if they do not stay


@dataclass(frozen=True)
class Plan:
    """All that is known of a slice before the first byte moves."""

    size: Submodel
    config: dict[str, Any]
    quantization: dict[str, Any] | None  # of `hf_quant_config.json`
    sizes: Sizes
    pieces: Mapping[str, Piece]  # by the parent's tensor, in the parent's order

    @property
    def bytes(self) -> int:
        """Bytes of weights that it takes on disk."""
        return sum(spec.bytes for spec in self.specs)

    @property
    def specs(self) -> list[Spec]:
        """Its tensors, in order."""
        return [piece.spec for piece in self.pieces.values()]


def slice_checkpoint(
    checkpoint: Checkpoint,
    target: str | Path,
    size: str | None = None,
    fields: Fields | None = None,
    overwrite: bool = False,
    max_shard_size: int = 5 * 10**9,
    bits: int | None = None,
) -> Submodel:
    """Cut one size out into a stock folder that loads without this package.

    Exactly one of `size` (a name) and `fields` (config fields) says which. `bits`: of codes of
    eight bits in groups, keep four.

    Raises:
        CheckpointError: no such size; a parent that cannot be read, or changes meanwhile.
        ValueError: a size this parent cannot hold, or that the stock class cannot express.
        FileExistsError: the target exists and `overwrite` is false.
        OSError: the disk is full, or another process is writing the target.
    """
    if (size is None) == (fields is None):
        raise ValueError("slice: say either a size's name or config fields")
    cut = custom(checkpoint, fields or {}) if size is None else checkpoint.size(size)
    slice_all(checkpoint, {Path(target): cut}, overwrite, max_shard_size, bits=bits)
    return cut


def custom(checkpoint: Checkpoint, fields: Fields, name: str = "custom") -> Submodel:
    """A size that nobody named.

    Raises:
        ValueError: a size this parent cannot hold.
    """
    check_fields(checkpoint.layout, fields)
    return submodel(checkpoint.layout, name, fields, trained=False)


def slice_all(
    checkpoint: Checkpoint,
    targets: Mapping[Path, Submodel],
    overwrite: bool = False,
    max_shard_size: int = 5 * 10**9,
    progress: Progress | None = None,
    bits: int | None = None,
) -> None:
    """Cut several sizes, each into its own folder, in one pass over the parent; see
    `slice_checkpoint`."""
    refuse_source(checkpoint, targets)
    plans = {target: plan(checkpoint, size, bits) for target, size in targets.items()}
    write_slices(checkpoint, plans, overwrite, max_shard_size, progress)


def write_slices(
    checkpoint: Checkpoint,
    plans: Mapping[Path, Plan],
    overwrite: bool = False,
    max_shard_size: int = 5 * 10**9,
    progress: Progress | None = None,
) -> None:
    """`slice_all` for slices that are planned already, none of them onto its source."""
    for target in plans:
        check_room(target, sum(each.bytes + _METADATA for each in plans.values()))
    with ExitStack() as stack:
        folders = {
            target: stack.enter_context(atomic_folder(target, overwrite)) for target in plans
        }
        with Reader(checkpoint.path, checkpoint.stored) as reader, ExitStack() as files:
            shards = [
                files.enter_context(Shards(folders[target], each.specs, max_shard_size))
                for target, each in plans.items()
            ]
            _cut(reader, list(plans.values()), shards, progress)
        for target, each in plans.items():
            write_beside(checkpoint, each, folders[target])


def plan(checkpoint: Checkpoint, size: Submodel, bits: int | None = None) -> Plan:
    """Names, shapes and bytes of a slice.

    Args:
        bits: of codes of eight bits in groups, keep so many: four.

    Raises:
        ValueError: the stock class cannot express it, it cuts inside a block of codes, or codes
            are not of eight bits in groups.
    """
    layout = checkpoint.layout
    config = configs.config_json(configs.child_config(layout, size.config))
    if bits is not None:
        config["quantization_config"] = fewer.declared(checkpoint.path, config, bits)
    child = layout.sizes_of(size.config)
    quantization = None
    if checkpoint.is_quantized:
        kept = {layer: n for n, layer in enumerate(layout.kept_layers(child))}
        here = kept if DEPTH in size.config else {layer: layer for layer in kept}
        if "quantization_config" in config:
            declared = packed.renumbered(config["quantization_config"], here)
            config["quantization_config"] = declared
        if (checkpoint.path / QUANTIZATION).is_file():
            beside = read_json(checkpoint.path / QUANTIZATION)
            quantization = packed.renumbered(beside, here)
    pieces = {piece.weight.name: piece for piece in _pieces(checkpoint, child)}
    if bits is not None:
        pieces = {name: _at_fewer_bits(piece, pieces) for name, piece in pieces.items()}
    ordered = {name: pieces[name] for name in checkpoint.stored if name in pieces}
    return Plan(size, config, quantization, child, ordered)


def bytes_to_read(plans: Sequence[Plan]) -> int:
    """Bytes of the parent that these slices need: rows that any of them keeps, once."""
    found = 0
    for corners in _by_tensor(plans).values():
        found += corners[0][1].corner.row * total(union(p.corner.rows for _, p in corners))
    return found


def _pieces(checkpoint: Checkpoint, child: Sizes) -> Iterator[Piece]:
    parent = checkpoint.layout.sizes
    for name, weight in checkpoint.layout.kept(child, checkpoint.weights):
        dtype = checkpoint.stored[weight.name].dtype
        corner = corner_of(weight, STORED_ITEMSIZE[dtype], parent, child)
        yield Piece(name, weight, Spec(name, dtype, weight.shape(child)), corner)


def _at_fewer_bits(piece: Piece, pieces: Mapping[str, Piece]) -> Piece:
    beside = pieces.get(piece.weight.name.rpartition(".")[0] + ".weight_packed")
    found = fewer.fewer(piece.name, piece.weight, piece.spec, beside and beside.weight)
    if found is None:
        return piece
    return replace(piece, weight=found.weight, spec=found.spec, convert=found.convert)


def _by_tensor(plans: Sequence[Plan]) -> dict[str, list[tuple[int, Piece]]]:
    found: dict[str, list[tuple[int, Piece]]] = {}
    for number, each in enumerate(plans):
        for name, piece in each.pieces.items():
            found.setdefault(name, []).append((number, piece))
    return found


def _cut(
    reader: Reader, plans: Sequence[Plan], shards: Sequence[Shards], progress: Progress | None
) -> None:
    wanted = {
        name: [
            (piece.corner, partial(_write, shards[number], plans[number], piece))
            for number, piece in pieces
        ]
        for name, pieces in _by_tensor(plans).items()
    }
    transfer(reader, {name: wanted[name] for name in reader.names if name in wanted}, progress)


def _write(shard: Shards, planned: Plan, piece: Piece, data: memoryview) -> None:
    told = piece.name.endswith(packed.SHAPE)
    kept = data if piece.convert is None else piece.convert(data)
    shard.write(shape_of(planned, piece) if told else kept)


def shape_of(planned: Plan, piece: Piece) -> memoryview:
    """The one tensor whose values change: it tells the shape of the codes beside it."""
    codes = planned.pieces[piece.weight.name.replace(packed.SHAPE, "weight_packed")].weight
    shape = packed.shape_told(codes, planned.sizes)
    return np.array(shape, STORED[piece.spec.dtype]).view(np.uint8).data


def write_beside(checkpoint: Checkpoint, planned: Plan, folder: Path) -> None:
    """All files of a slice but its weights: config, card, and the parent's companions."""
    write_json(folder / "config.json", planned.config)
    if planned.quantization is not None:
        write_json(folder / QUANTIZATION, planned.quantization)
    text = card.of_slice(
        checkpoint.path.resolve().name,
        planned.size,
        checkpoint.layout,
        checkpoint.space,
        card.licence_of(checkpoint.path),
        planned.config.get("quantization_config"),
    )
    write_file(folder / card.CARD, text.encode())
    copy_companions(checkpoint.path, folder)


def refuse_source(checkpoint: Checkpoint, targets: Iterable[Path], verb: str = "slice") -> None:
    """No folder that goes, or that is used meanwhile, may be the source or another target."""
    files = {checkpoint.path / each.file for each in checkpoint.stored.values()}  # maybe links
    real = [path.resolve() for path in (checkpoint.path, *files)]
    homes = {home for path in real for home in (path, *path.parents)}
    found = [target.resolve() for target in targets]
    for number, target in enumerate(found):
        for goes in (target, *siblings(target)):
            if goes.exists() and any(os.path.samefile(goes, home) for home in homes):
                what = "is" if goes == checkpoint.path.resolve() else "holds"
                raise ValueError(f"{verb}: {goes} {what} the checkpoint itself")
        for other in found[:number]:
            if other == target:
                raise ValueError(f"{verb}: {target}: two sizes for one folder")
            if other in target.parents or target in other.parents:
                raise ValueError(f"{verb}: {other} and {target}: one is inside the other")
