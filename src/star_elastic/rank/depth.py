"""Layers by what the logits lose without them (Nemotron Elastic, arXiv 2511.16664, eq. 5).

    s_j = sum (M_full - M_-j)^2 / sum M_full^2

over real tokens and the vocabulary, with iterative removal: the layer of the smallest s_j goes,
and the next iteration measures M_-j without it and without all layers gone before; M_full is the
whole parent throughout. The last layer of each kind stays, since stock hybrids cannot generate
without, say, attention.

One iteration is one sweep over the layers that carries the hidden states of all candidates; those
that have lost the same layers so far are one stream. With L layers and C candidates it costs about
C L / 2 layer runs and C heads per token, so ranking down to one layer costs about L^3 / 6 layer
runs a token: L = 52 takes some 23 000, as much as 450 forward passes. `min_layers` ends it early
(the first iteration alone: about L / 2 passes), and fewer samples than for widths suffice.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from star_elastic.layout import Layout
from star_elastic.rank.blocks import HELD, Blocks, CalibrationBatch, Flow, Run

_Gone = frozenset[int]
_Streams = list[tuple[Tensor, list[_Gone]]]  # hidden states, and the variants that share them


@torch.no_grad()
def layer_errors(
    blocks: Blocks, batches: Sequence[CalibrationBatch], min_layers: int = 1, held: int = HELD
) -> Tensor:
    """Normalised logit errors (iterations, layers), infinite where a layer was no candidate.

    Args:
        batches: (token ids, mask of real tokens), each (batch, length); read once an iteration.
        min_layers: stop when so many layers are left; the first iteration always runs.
        held: bytes of hidden states, of all candidates together, that a group may hold.
    """
    kinds = blocks.layout.blocks
    remaining = list(range(len(kinds)))
    rows: list[Tensor] = []
    while (candidates := _removable(kinds, remaining)) and (
        not rows or len(remaining) > min_layers
    ):
        rows.append(_errors(blocks, batches, remaining, candidates, held))
        remaining.remove(_worst(rows[-1]))
    return torch.stack(rows) if rows else torch.empty(0, len(kinds), dtype=torch.float64)


def layer_order(layout: Layout, errors: Tensor, min_layers: int = 1) -> list[int]:
    """Layers best first: those never removed by their last errors, then the removed, last first.

    Args:
        errors: of `layer_errors`, down to `min_layers` or fewer.

    Raises:
        ValueError: the errors end before so few layers are left.
    """
    remaining, removed = list(range(len(layout.blocks))), list[int]()
    last = torch.full((len(remaining),), torch.inf)
    for iteration, row in enumerate(errors):
        if iteration and len(remaining) <= min_layers:
            break
        last = row
        if len(remaining) > min_layers:
            removed.append(_worst(row))
            remaining.remove(removed[-1])
    if len(remaining) > min_layers and _removable(layout.blocks, remaining):
        raise ValueError(f"min_layers = {min_layers}: scores rank down to {len(remaining)} only")
    best = sorted(remaining, key=lambda layer: (-float(last[layer]), layer))
    return best + removed[::-1]


def _removable(kinds: Sequence[tuple[str, ...]], remaining: Sequence[int]) -> list[int]:
    left = [kinds[layer] for layer in remaining]
    return [layer for layer in remaining if left.count(kinds[layer]) > 1]


def _worst(errors: Tensor) -> int:
    """The layer that matters least; of equals the last."""
    values = errors.tolist()
    return min(range(len(values)), key=lambda layer: (values[layer], -layer))


def _errors(
    blocks: Blocks,
    batches: Sequence[CalibrationBatch],
    remaining: Sequence[int],
    candidates: Sequence[int],
    held: int,
) -> Tensor:
    gone = frozenset(range(len(blocks.layers))).difference(remaining)
    variants = [frozenset[int](), *(gone | {layer} for layer in candidates)]
    error = torch.full((len(blocks.layers),), torch.inf, dtype=torch.float64)
    error[list(candidates)] = 0
    square = torch.zeros((), dtype=torch.float64)
    for group in blocks.groups(batches, held, streams=len(variants)):
        for flow, finals in zip(group, _swept(blocks, group, variants), strict=True):
            full = blocks.logits(flow, finals[variants[0]])[flow.mask].float()
            square += full.square().sum(dtype=torch.float64).cpu()
            for layer, variant in zip(candidates, variants[1:], strict=True):
                without = blocks.logits(flow, finals[variant])[flow.mask].float()
                error[layer] += (full - without).square().sum(dtype=torch.float64).cpu()
    return error / square


def _swept(
    blocks: Blocks, group: Sequence[Flow], variants: list[_Gone]
) -> list[dict[_Gone, Tensor]]:
    """Final hidden states of every variant, for each batch of a group."""
    streams: list[_Streams] = [[(flow.hidden, variants)] for flow in group]
    for layer in range(len(blocks.layers)):
        with blocks.layer(layer) as run:
            for number, flow in enumerate(group):
                streams[number] = _advanced(streams[number], layer, flow, run)
    return [{variant: hidden for hidden, (variant,) in batch} for batch in streams]


def _advanced(streams: _Streams, layer: int, flow: Flow, run: Run) -> _Streams:
    """Through one layer: a stream forks where some of its variants skip it and others do not."""
    after: _Streams = []
    for hidden, variants in streams:
        if skipping := [variant for variant in variants if layer in variant]:
            after.append((hidden, skipping))
        if staying := [variant for variant in variants if layer not in variant]:
            after.append((run(hidden, flow), staying))
    return after
