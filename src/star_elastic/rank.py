"""Importance of every unit from one calibration pass, and the reordering that nests the sizes.

Criteria, all on activations (Nemotron Elastic, arXiv 2511.16664, section 3.1; Minitron, arXiv
2407.14679), summed over calibration tokens:

    hidden channel    sum over norms of |norm(x)|_i                              eq. 1
    FFN channel       |input of the down projection|_i; per expert where routed  eq. 2
    Mamba channel     || s_:,d ||_2 over heads, s the x part of in_proj          eq. 3
    Mamba head        || s_h ||_2, ranked within its group (shared B and C)      eq. 4
    attention head    || input of o_proj for that head ||_2, within its KV group
    routed expert     REAP: mean over its tokens of gate * || output ||_2        arXiv 2510.13999
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from star_elastic import stock
from star_elastic.families import Probe
from star_elastic.layout import Layout, Weight, symbol_of
from star_elastic.shapes import Dim, width

# (layer, symbol) -> scores; the last dimension is ranked, the ones before it are groups.
Scores = dict[tuple[int | None, str], Tensor]
Order = dict[tuple[int | None, str], Tensor]  # best first, same shapes


@torch.no_grad()
def score(model: PreTrainedModel, batches: Iterable[tuple[Tensor, Tensor]]) -> Scores:
    """Run calibration batches through a stock model and score every unit of every axis.

    Args:
        batches: (token ids, mask of real tokens), each (batch, length).

    Returns:
        Scores by (layer, symbol); hidden channels have layer None, expert channels are
        (experts, channels), heads are (groups, heads of the group).
    """
    layout = Layout(model.config)
    sums: dict[tuple[int | None, str, str], Tensor] = {}
    for input_ids, mask in batches:
        keep = mask.bool().flatten()
        with _hooked(model, layout, keep, sums):
            model(input_ids=input_ids, use_cache=False)
    return _scores(layout, sums)


def order(scores: Scores) -> Order:
    """Best first; equal scores keep their place."""
    return {
        key: torch.argsort(values, dim=-1, descending=True, stable=True)
        for key, values in scores.items()
    }


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
    layout: Layout, segment: tuple[str, ...], layer: int | None, expert: int | None, orders: Order
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


@contextmanager
def _hooked(
    model: nn.Module, layout: Layout, keep: Tensor, sums: dict[tuple[int | None, str, str], Tensor]
) -> Iterator[None]:
    """Probes of the family's table on a stock model, for one batch; `keep` masks real tokens."""

    def add(layer: int | None, symbol: str, kind: str, value: Tensor) -> None:
        key = (layer, symbol, kind)
        value = value.double()
        sums[key] = sums[key] + value if key in sums else value

    hooks = []
    modules = dict(model.named_modules())
    for layer, prefix, probe in _probes(layout):
        module = modules.get(prefix + probe.module)
        if module is None or isinstance(module, nn.Identity):  # an optional part, switched off
            continue
        if probe.side == "experts":
            hook = _expert_hook(layout, layer, probe, keep, add)
            hooks.append(module.register_forward_pre_hook(hook))
            continue
        dims = layout.weights[f"{prefix}{probe.module}.weight"].dims
        dim = dims[1] if probe.side == "input" else dims[0]
        hooks.append(
            module.register_forward_hook(_activation_hook(layout, layer, probe, dim, keep, add))
        )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _probes(layout: Layout) -> Iterator[tuple[int | None, str, Probe]]:
    for probe in layout.family.probes["outside"]:
        yield None, "", probe
    for layer, parts in enumerate(layout.blocks):
        for part in parts:
            for probe in layout.family.probes.get(part, ()):
                yield layer, layout.family.layer_prefix.format(layer=layer), probe


def _activation_hook(
    layout: Layout,
    layer: int | None,
    probe: Probe,
    dim: Dim,
    keep: Tensor,
    add: Callable[[int | None, str, str, Tensor], None],
) -> Callable[..., None]:
    segment = dim[probe.segment]
    start = width(dim[: probe.segment], layout.sizes)
    shape = [layout.sizes[symbol] for symbol in segment]

    def hook(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        activation = inputs[0] if probe.side == "input" else output
        units = activation.flatten(0, -2)[keep].narrow(-1, start, width((segment,), layout.sizes))
        if len(segment) == 1:
            shared = "hidden_size" in probe.fields
            add(None if shared else layer, segment[0], "abs", units.abs().sum(0))
        else:
            add(layer, "*".join(segment), "square", units.square().sum(0).view(shape))

    return hook


def _expert_hook(
    layout: Layout,
    layer: int | None,
    probe: Probe,
    keep: Tensor,
    add: Callable[[int | None, str, str, Tensor], None],
) -> Callable[..., None]:
    experts, channels = probe.fields

    def hook(module: Any, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
        hidden, chosen, gates = inputs
        gates = gates / gates.sum(-1, keepdim=True)
        reap = hidden.new_zeros(layout.sizes[experts])
        tokens = hidden.new_zeros(layout.sizes[experts])
        magnitude = hidden.new_zeros(layout.sizes[experts], layout.sizes[channels])
        for expert in chosen[keep].unique().tolist():
            token, slot = torch.where((chosen == expert) & keep[:, None])
            inner = _expert_inner(module, expert, hidden[token])
            outer = F.linear(inner, module.down_proj[expert])
            reap[expert] = (gates[token, slot] * outer.norm(dim=-1)).sum()
            tokens[expert] = len(token)
            magnitude[expert] = inner.abs().sum(0)
        add(layer, experts, "reap", reap)
        add(layer, experts, "tokens", tokens)
        add(layer, channels, "abs", magnitude)

    return hook


def _expert_inner(module: Any, expert: int, hidden: Tensor) -> Tensor:
    """What enters the down projection of one routed expert, gated or not."""
    if module.has_gate:
        return module._apply_gate(F.linear(hidden, module.gate_up_proj[expert]))
    return module.act_fn(F.linear(hidden, module.up_proj[expert]))


def _scores(layout: Layout, sums: dict[tuple[int | None, str, str], Tensor]) -> Scores:
    scores: Scores = {}
    axes = {symbol_of(layout.family, axis) for axis in layout.axes}
    for (layer, symbol, kind), value in sums.items():
        if kind == "reap":
            scores[layer, symbol] = value / sums[layer, symbol, "tokens"].clamp(min=1)
        elif kind == "abs":
            scores[layer, symbol] = value
        elif kind == "square":
            for position, factor in enumerate(symbol.split("*")):
                if factor in axes:
                    scores[layer, factor] = _group_norm(value, position)
    return {key: value for key, value in scores.items() if key[1] in axes}


def _group_norm(squares: Tensor, position: int) -> Tensor:
    """Norm of each unit of one factor: groups are kept for heads, merged for head channels."""
    if position == squares.dim() - 1:
        return squares.flatten(0, -2).sum(0).sqrt()
    return squares.flatten(position + 1).sum(-1).sqrt()
