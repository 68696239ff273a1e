"""The calibration pass: probes on one block at a time, added up in raw sums (see `criteria`)."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from star_elastic.layout import Layout
from star_elastic.rank.blocks import HELD, Blocks, CalibrationBatch
from star_elastic.rank.criteria import (
    Key,
    Place,
    Raw,
    Scores,
    describe,
    places,
    scores_of,
    sum_key,
)

_Add = Callable[[Key, Tensor], None]
_Hook = Callable[..., None]


def score(
    model: PreTrainedModel,
    batches: Iterable[CalibrationBatch],
    kept: Mapping[str, int] | None = None,
) -> Scores:
    """Run calibration batches through a stock model in memory; score every unit of every axis.

    Args:
        batches: (token ids, mask of real tokens), each (batch, length).
        kept: see `scores_of`.
    """
    blocks = Blocks(model)
    return scores_of(blocks.layout, measure(blocks, batches), kept)


@torch.no_grad()
def measure(blocks: Blocks, batches: Iterable[CalibrationBatch], held: int = HELD) -> Raw:
    """The raw sums of a calibration of any length: one sweep over the layers per group of batches.

    Args:
        batches: (token ids, mask of real tokens), each (batch, length); padding on the right.
        held: bytes of hidden states that a group may hold; fetched layers are read once a group.
    """
    sums: dict[Key, Tensor] = {}
    samples = tokens = 0
    for group in blocks.groups(batches, held):
        for layer in range(len(blocks.layers)):
            with blocks.layer(layer) as run:
                for flow in group:
                    with _hooked(blocks, layer, flow.mask, sums):
                        flow.hidden = run(flow.hidden, flow)
        for flow in group:
            with _hooked(blocks, None, flow.mask, sums):
                blocks.logits(flow, flow.hidden, last=1)
            samples += len(flow.mask)
            tokens += int(flow.mask.sum())
    return Raw(sums, samples, tokens, describe(blocks.layout))


@contextmanager
def _hooked(
    blocks: Blocks, layer: int | None, mask: Tensor, sums: dict[Key, Tensor]
) -> Iterator[None]:
    """Probes of the family's table on one layer (None: outside), for one batch's real tokens."""

    def add(key: Key, value: Tensor) -> None:
        value = value.double().cpu()
        sums[key] = sums[key] + value if key in sums else value

    keep = mask.flatten()
    hooks = []
    try:
        for place in places(blocks.layout):
            if place.layer != layer:
                continue
            module = blocks.model.get_submodule(place.module)
            if place.probe.side == "experts":
                hook = _expert_hook(blocks.layout, place, keep, add)
                hooks.append(module.register_forward_pre_hook(hook))
            else:
                hook = _activation_hook(blocks.layout, place, keep, add)
                hooks.append(module.register_forward_hook(hook))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _activation_hook(layout: Layout, place: Place, keep: Tensor, add: _Add) -> _Hook:
    shape = [layout.sizes[symbol] for symbol in place.segment]
    key = sum_key(place.layer, place.segment)

    def hook(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        activation = inputs[0] if place.probe.side == "input" else output
        units = activation.flatten(0, -2)[keep].narrow(-1, place.start, prod(shape)).float()
        units = units.abs() if key[2] == "abs" else units.square()
        add(key, units.sum(0, dtype=torch.float64).view(shape))

    return hook


def _expert_hook(layout: Layout, place: Place, keep: Tensor, add: _Add) -> _Hook:
    layer, (experts, channels) = place.layer, place.probe.fields
    count, inner_width = layout.sizes[experts], layout.sizes[channels]

    def hook(module: Any, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
        hidden, chosen, gates = inputs
        gates = gates.float() / gates.float().sum(-1, keepdim=True)
        reap = torch.zeros(count, dtype=torch.float64, device=hidden.device)
        tokens, magnitude = torch.zeros_like(reap), reap.new_zeros(count, inner_width)
        for expert in chosen[keep].unique().tolist():
            token, slot = torch.where((chosen == expert) & keep[:, None])
            inner = _expert_inner(module, expert, hidden[token])
            outer = F.linear(inner, module.down_proj[expert]).float()
            reap[expert] = (gates[token, slot] * outer.norm(dim=-1)).sum(dtype=torch.float64)
            tokens[expert] = len(token)
            magnitude[expert] = inner.float().abs().sum(0, dtype=torch.float64)
        add((layer, experts, "reap"), reap)
        add((layer, experts, "tokens"), tokens)
        add((layer, channels, "abs"), magnitude)

    return hook


def _expert_inner(module: Any, expert: int, hidden: Tensor) -> Tensor:
    """What enters the down projection of one routed expert, gated or not."""
    if module.has_gate:
        return module._apply_gate(F.linear(hidden, module.gate_up_proj[expert]))
    return module.act_fn(F.linear(hidden, module.up_proj[expert]))
