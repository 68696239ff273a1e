"""Importance of every unit: the criteria, from raw sums over calibration tokens to an order.

All on activations (Nemotron Elastic, arXiv 2511.16664, section 3.1; Minitron, arXiv 2407.14679),
summed over the real tokens t of a calibration sample:

    hidden channel i     sum_t |norm(x_t)|_i, over all norms of the residual stream      eq. 1
    FFN channel i        sum_t |input of the down projection|_i                          eq. 2
                         also of shared experts, and of each routed one over its tokens
    latent channel i     sum_t |latent projection of x_t|_i: eq. 1 for the width experts see
    Mamba channel d      s_d = ||s_:,d||_2 over tokens and heads; s = norm(x) W_x        eq. 3
    Mamba head h         f_h = ||s_h,D_top||_2 over tokens and the channels kept, ranked
                         within its group, whose heads share B and C                     eq. 4
    attention head h     ||input of o_proj for h||_2 over tokens and channels, ranked
                         within its KV group (Minitron eq. 1; the L2 norm over tokens is that of
                         eq. 3 and 4)
    routed expert j      REAP: mean over the tokens routed to j of g_j(x) ||f_j(x)||_2, gates g
                         renormalised over the top k (arXiv 2510.13999, eq. 9)
    layer j              sum (M_full - M_-j)^2 / sum M_full^2 on logits (eq. 5), see `depth`

Heads and channels of one projection keep their squares apart, heads x channels, so that heads can
be ranked for any number of channels without a second pass.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from star_elastic.families import Probe
from star_elastic.layout import Layout
from star_elastic.shapes import Segment, width
from star_elastic.symbols import DEPTH, symbol_of

# (layer, symbol) -> scores; the last dimension is ranked, the ones before it are groups.
Scores = dict[tuple[int | None, str], Tensor]
Order = dict[tuple[int | None, str], Tensor]  # best first, same shapes
Key = tuple[int | None, str, str]  # layer, symbols joined by *, kind

CRITERIA = {
    "abs": "sum of |activation| over tokens",
    "square": "sum of activation^2 over tokens, factor by factor of the projection",
    "reap": "sum over routed tokens of renormalised gate * ||output||_2",
    "tokens": "tokens routed",
    "depth": "sum (M_full - M_-j)^2 / sum M_full^2 on logits, one row an iteration of removal",
}


@dataclass(frozen=True)
class Raw:
    """Raw sums of one calibration, from which the scores of any choice follow.

    `depth` is (iterations, layers), infinite where a layer was no candidate; `parent` describes the
    model that was measured (`describe`).
    """

    sums: Mapping[Key, Tensor]
    samples: int
    tokens: int
    parent: Mapping[str, int | str]
    depth: Tensor | None = None


def describe(layout: Layout) -> dict[str, int | str]:
    """What scores must agree with: the model type, all sizes, and the kinds of its layers."""
    sizes = {name: value for name, value in layout.sizes.items() if isinstance(value, int)}
    kinds = " ".join("+".join(parts) for parts in layout.blocks)
    return {"model_type": layout.family.model_type, **dict(sorted(sizes.items())), "layers": kinds}


@dataclass(frozen=True)
class Place:
    """A probe of this very model: `module` by its whole name, and the units it sees there.

    They are `segment`, from index `start` of the last dimension; empty inside experts.
    """

    layer: int | None
    module: str
    probe: Probe
    segment: Segment = ()
    start: int = 0


def places(layout: Layout) -> Iterator[Place]:
    """Every probe of the family's table that this model has."""
    yield from _places(layout, None, "", layout.family.probes["outside"])
    for layer, parts in enumerate(layout.blocks):
        prefix = layout.family.layer_prefix.format(layer=layer)
        for part in parts:
            yield from _places(layout, layer, prefix, layout.family.probes.get(part, ()))


def _places(
    layout: Layout, layer: int | None, prefix: str, table: Sequence[Probe]
) -> Iterator[Place]:
    for probe in table:
        module = prefix + probe.module
        weight = layout.weights.get(f"{module}.weight")
        if probe.side == "experts":
            yield Place(layer, module, probe)
        elif weight is not None:  # else an optional part, switched off
            dim = weight.dims[probe.side == "input"]
            start = width(dim[: probe.segment], layout.sizes)
            yield Place(layer, module, probe, dim[probe.segment], start)


def raw_shapes(layout: Layout) -> dict[Key, tuple[int, ...]]:
    """The shape of every raw sum that one calibration of this model gives."""
    shapes: dict[Key, tuple[int, ...]] = {}
    for place in places(layout):
        layer = place.layer
        if place.probe.side == "experts":
            experts, channels = place.probe.fields
            sizes = layout.sizes[experts], layout.sizes[channels]
            shapes[layer, experts, "reap"] = shapes[layer, experts, "tokens"] = sizes[:1]
            shapes[layer, channels, "abs"] = sizes
        else:
            sizes = tuple(layout.sizes[symbol] for symbol in place.segment)
            shapes[sum_key(layer, place.segment)] = sizes
    return shapes


def sum_key(layer: int | None, segment: Segment) -> Key:
    """Where the raw sum of a segment's activations goes; hidden channels are every layer's."""
    kind = "abs" if len(segment) == 1 else "square"
    return (None if segment == ("hidden_size",) else layer), "*".join(segment), kind


def scores_of(layout: Layout, raw: Raw, kept: Mapping[str, int] | None = None) -> Scores:
    """The score of every unit of every axis but depth, from raw sums.

    Args:
        kept: symbol or field -> how many units will stay, e.g. {"mamba_head_dim": 48}: heads are
            then scored on the best 48 channels, D_top of eq. 4. By default on all.

    Returns:
        Scores by (layer, symbol); hidden channels have layer None, expert channels are
        (experts, channels), heads are (groups, heads of the group).
    """
    scores: Scores = {}
    axes = {symbol_of(layout.family, axis) for axis in layout.axes}
    for (layer, symbol, kind), value in raw.sums.items():
        if kind == "reap":
            scores[layer, symbol] = value / raw.sums[layer, symbol, "tokens"].clamp(min=1)
        elif kind == "abs":
            scores[layer, symbol] = value
        elif kind == "square":
            inner = symbol.split("*")[-1]
            count = (kept or {}).get(inner, layout.sizes[inner]) if inner in axes else None
            for position, factor in enumerate(symbol.split("*")):
                scores[layer, factor] = _norms(value, position, count)
    return {key: value for key, value in scores.items() if key[1] in axes}


def order(scores: Scores) -> Order:
    """Best first; equal scores keep their place."""
    return {
        key: torch.argsort(values, dim=-1, descending=True, stable=True)
        for key, values in scores.items()
    }


def random_order(layout: Layout, seed: int) -> tuple[Order, list[int]]:
    """The baseline: units of every axis at random within their groups, and layers at random.

    One layer of each kind comes first, as where layers are ranked (see `depth`).
    """
    draw = torch.Generator().manual_seed(seed)
    sums = {
        key: 1 + torch.rand(shape, generator=draw, dtype=torch.float64)
        for key, shape in raw_shapes(layout).items()
    }
    scores = scores_of(layout, Raw(sums, 0, 0, describe(layout)))
    drawn = torch.randperm(layout.sizes[DEPTH], generator=draw).tolist()
    kinds = [layout.blocks[layer] for layer in drawn]
    first = [layer for n, layer in enumerate(drawn) if kinds[n] not in kinds[:n]]
    return order(scores), first + [layer for layer in drawn if layer not in first]


def _norms(squares: Tensor, position: int, kept: int | None) -> Tensor:
    """Norm of each unit of one factor: groups are kept for heads, merged for head channels."""
    channels = squares.flatten(0, -2).sum(0)
    if position == squares.dim() - 1:
        return channels.sqrt()
    if kept is not None:
        squares = squares[..., channels.argsort(descending=True, stable=True)[:kept]]
    return squares.flatten(position + 1).sum(-1).sqrt()
