"""Units into their order, in memory or from folder to folder; the function stays the same (I1)."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from star_elastic import stock
from star_elastic.checkpoint import Checkpoint
from star_elastic.dtypes import dtype_of
from star_elastic.folder import Spec
from star_elastic.layout import Layout, Weight
from star_elastic.rank.criteria import Order
from star_elastic.shapes import Segment, width
from star_elastic.submodel import ElasticSpace
from star_elastic.tensors import refuse_codes, write_stored


@torch.no_grad()
def reorder(model: PreTrainedModel, orders: Order) -> None:
    """Permute a model's units in place, best first; the function it computes stays the same (I1).

    An axis without an order keeps its own.
    """
    layout = Layout(model.config)
    state = stock.get_tensors(model)
    before: dict[str, Tensor] = {}
    for weight in layout.stored.values():
        name = weight.place[0]
        if name not in before:  # a whole tensor at a time: experts swap places inside it
            before = {name: state[name].clone()}
        source = layout.view(before, _source(layout, weight, orders))
        layout.view(state, weight).copy_(_permuted(layout, weight, source, orders))


def reorder_checkpoint(
    checkpoint: Checkpoint,
    orders: Order,
    layer_order: Sequence[int] | None,
    target: str | Path,
    overwrite: bool = False,
    max_shard_size: int = 5 * 10**9,
) -> None:
    """Write the parent of a folder in nested order, one tensor in memory at a time.

    The new folder declares its layers' order and one size, `full`: sizes of the old order are none
    of the new one. Without a `layer_order` that of the checkpoint, if any, stays.

    Raises:
        ValueError: the target is the checkpoint itself.
        FileExistsError: the target exists and `overwrite` is false.
    """
    if Path(target).resolve() == checkpoint.path.resolve():
        raise ValueError(f"rank: {target} is the checkpoint itself")
    layout = Layout(checkpoint.config, layer_order or checkpoint.layout.layer_order)
    space = ElasticSpace.of(layout, {"full": {}}, trained=True)
    refuse_codes(checkpoint)
    stored = {name: checkpoint.stored[name] for name in layout.stored}
    write_stored(
        target,
        [Spec(name, each.dtype, each.shape) for name, each in stored.items()],
        _sorted_tensors(checkpoint, orders),
        layout,
        space,
        getattr(torch, dtype_of(checkpoint.config)),
        source=checkpoint.path,
        overwrite=overwrite,
        max_shard_size=max_shard_size,
        indexed=True,  # for `scores.safetensors`
    )


def _sorted_tensors(checkpoint: Checkpoint, orders: Order) -> Iterator[Tensor]:
    layout = checkpoint.layout
    names = {(weight.place, weight.expert): name for name, weight in layout.stored.items()}
    sources = (_source(layout, weight, orders) for weight in layout.stored.values())
    wholes = checkpoint.read(names[source.place, source.expert] for source in sources)
    for weight, whole in zip(layout.stored.values(), wholes, strict=True):
        yield _permuted(layout, weight, whole, orders)


def _source(layout: Layout, weight: Weight, orders: Order) -> Weight:
    """The weight that moves into this one's place: another expert's, where experts are ordered."""
    experts = orders.get((weight.layer, layout.family.experts or ""))
    if weight.expert is None or experts is None:
        return weight
    return replace(weight, expert=int(experts[weight.expert]))


def _permuted(layout: Layout, weight: Weight, tensor: Tensor, orders: Order) -> Tensor:
    expert = _source(layout, weight, orders).expert
    for position, dim in enumerate(weight.dims):
        starts = [width(dim[:n], layout.sizes) for n in range(len(dim))]
        index = torch.cat(
            [
                start + _segment_index(layout, segment, weight.layer, expert, orders)
                for start, segment in zip(starts, dim, strict=True)
            ]
        )
        tensor = tensor.index_select(position, index.to(tensor.device))
    return tensor


def _segment_index(
    layout: Layout, segment: Segment, layer: int | None, expert: int | None, orders: Order
) -> Tensor:
    """Flat indices of one segment in the new order, factor by factor, outermost first."""
    index = torch.zeros((), dtype=torch.long)
    for symbol in segment:
        size = width(((symbol,),), layout.sizes)
        units = orders.get((layer, symbol), orders.get((None, symbol), torch.arange(size)))
        if units.dim() == 2 and expert is not None:
            units = units[expert]  # expert channels: every expert has its own order
        index = index[..., None] * size + units.cpu()
    return index.flatten()
