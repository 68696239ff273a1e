"""A checkpoint's weights in memory: whole tensors in, a parent out."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from star_elastic import card, configs
from star_elastic.checkpoint import Checkpoint, copy_companions
from star_elastic.dtypes import STORED, STORED_AS
from star_elastic.folder import (
    CheckpointError,
    Shards,
    Spec,
    atomic_folder,
    check_room,
    digest,
    write_file,
    write_json,
)
from star_elastic.layout import Layout, Weight
from star_elastic.submodel import ElasticSpace


def in_memory(opened: Checkpoint, weights: Iterable[Weight]) -> Iterator[tuple[str, Tensor]]:
    """Whole tensors under their in-memory names, one at a time; fused ones are put together.

    Raises:
        CheckpointError: they stand there as codes.
    """
    for weight in weights:
        shape = weight.shape(opened.layout.sizes)
        whole = torch.empty(shape, dtype=dtype_of(opened, weight))
        stored = opened.layout.pieces[weight.name]
        for piece, tensor in zip(stored, opened.read(p.name for p in stored), strict=True):
            opened.layout.view({weight.name: whole}, piece).copy_(tensor)
        yield weight.name, whole


def dtype_of(opened: Checkpoint, weight: Weight) -> torch.dtype:
    """The dtype in which an in-memory tensor is stored.

    Raises:
        CheckpointError: it stands there as codes.
    """
    first, *others = opened.layout.pieces[weight.name]
    if any(opened.weights.get(piece.name) is not piece for piece in (first, *others)):
        refuse_codes(opened)
    return getattr(torch, STORED[opened.stored[first.name].dtype])


def refuse_codes(opened: Checkpoint) -> None:
    """Models are ranked and trained in floating point.

    Raises:
        CheckpointError: the checkpoint is quantized.
    """
    if opened.is_quantized:
        raise CheckpointError(
            f"{opened.path}: its weights are quantized: they run and are cut, no more"
        )


def write(
    target: str | Path,
    state: Mapping[str, Tensor],
    layout: Layout,
    space: ElasticSpace | None,
    source: Path | None = None,
    tokenizer: Any = None,
    overwrite: bool = False,
    max_shard_size: int = 5 * 10**9,
    beside: Mapping[str, Callable[[Path], None]] | None = None,
) -> None:
    """Write a parent in memory as a checkpoint, atomically.

    Args:
        state: the parent's state dict, in nested order.
        space: its sizes; None writes a plain model folder.
        source: the folder whose tokenizer, generation config and licence go along.
        tokenizer: goes along, with a default generation config, where there is no such folder.
        beside: files that go beside the weights (a router), by name, each with its writer.

    Raises:
        FileExistsError: the target exists and `overwrite` is false.
        OSError: the disk is full, or another process is writing the target.
    """
    views = {name: layout.view(state, weight) for name, weight in layout.stored.items()}
    specs = [Spec(name, stored_as(t.dtype), tuple(t.shape)) for name, t in views.items()]
    dtype, shard = next(iter(state.values())).dtype, max_shard_size
    tensors = views.values()
    write_stored(
        target, specs, tensors, layout, space, dtype, source, tokenizer, overwrite, shard, beside
    )


def write_stored(
    target: str | Path,
    specs: Sequence[Spec],
    tensors: Iterable[Tensor],
    layout: Layout,
    space: ElasticSpace | None,
    dtype: torch.dtype,
    source: Path | None = None,
    tokenizer: Any = None,
    overwrite: bool = False,
    max_shard_size: int = 5 * 10**9,
    beside: Mapping[str, Callable[[Path], None]] | None = None,
    indexed: bool = False,
) -> None:
    """`write` for a parent that comes tensor by tensor, as its specs say; see there.

    `indexed`: one file has an index too, as others come beside it; see `Shards`.
    """
    indexed = indexed or bool(beside)
    check_room(Path(target), sum(spec.bytes for spec in specs))
    with atomic_folder(Path(target), overwrite) as folder:
        with Shards(folder, specs, max_shard_size, indexed=indexed) as shards:
            for tensor in tensors:
                shards.write(_bytes(tensor))
        digests = {name: digest(folder / name) for name in shards.files}
        for name, put in (beside or {}).items():
            put(folder / name)
            digests[name] = digest(folder / name)
        values = configs.config_json(layout.config)
        values["dtype"] = str(dtype).removeprefix("torch.")
        if space is not None:
            space = space.model_copy(update={"digests": digests})
            values["elastic_config"] = space.model_dump()
            licence = card.licence_of(source) if source is not None else None
            text = card.of_checkpoint(layout, space, licence)
            write_file(folder / card.CARD, text.encode())
        write_json(folder / "config.json", values)
        if source is not None:
            copy_companions(source, folder)
        elif tokenizer is not None:
            tokenizer.save_pretrained(folder)
            GenerationConfig.from_model_config(layout.config).save_pretrained(folder)


def stored_as(dtype: torch.dtype) -> str:
    """A dtype as safetensors names it: `BF16`."""
    return STORED_AS[str(dtype).removeprefix("torch.")]


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
