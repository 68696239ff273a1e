"""Masks: the parent at full width computes what a smaller model would, softly if asked (I3).

Only a router learns on masks: they let it feel what one unit more or less would do. A mask is a
number in [0, 1] per unit of a symbol; named shapes say which rows and columns of a weight those
units are. Three things go with it: an RMS norm over zeros divides by the width that is kept, a
dropped expert can never be picked by the gate, and a dropped layer adds nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from star_elastic import stock
from star_elastic.layout import Layout, Weight
from star_elastic.shapes import Dim, at, width
from star_elastic.symbols import DEPTH, symbol_of

# symbol -> one number a unit, (units,); a list holds one such tensor per layer of the parent.
# `layer` has one number per layer, `top_k` one per expert a token uses, best first.
Masks = Mapping[str, Any]
_RESIDUAL: Dim = (("hidden_size",),)  # what a layer writes to
_MOST = 30.0  # a dropped expert's logit may exceed all others: e^30 * 0 is 0 still


@dataclass(frozen=True)
class Masked:
    """The parent's tensors multiplied by masks, for a skeleton made by `masked_skeleton`."""

    layout: Layout
    masks: Masks

    def tensors(self, layer: int | None, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors a layer runs with, by in-memory name: masked, and what norms and gates ask.

        Args:
            whole: the parent's tensors of that layer (None: those outside the layers).
        """
        masks = at(self.masks, layer)
        whole = {name: tensor.detach() for name, tensor in whole.items()}  # the router learns
        found: dict[str, Tensor] = {}
        for name, tensor in whole.items():
            weight = self.layout.weights[name]
            module, _, leaf = name.rpartition(".")
            if weight.suffix in self.layout.family.norms:
                kept = self._kept(weight.dims[0], masks)
                tensor = tensor * kept.sqrt()
                found[f"{module}.kept_width"] = kept
            else:
                tensor = self._masked(weight, tensor, masks)
            found[name] = tensor
            if module.endswith(".gate") and leaf == "weight":
                found[f"{module}.kept_experts"] = self._units(self._experts, masks)
                found[f"{module}.kept_ranks"] = self._units(self.layout.family.top_k, masks)
        return found

    def _masked(self, weight: Weight, tensor: Tensor, masks: Masks) -> Tensor:
        first = 1 if "{" in weight.suffix else 0  # experts are stacked; the gate masks those
        for position in self.layout.family.masked.get(weight.suffix, ()):
            mask = self._dim(weight.dims[position + first], masks)
            if position == 0 and weight.dims[first] == _RESIDUAL and weight.layer is not None:
                mask = mask * masks["layer"]
            shape = [1] * tensor.dim()
            shape[position + first] = -1
            tensor = tensor * mask.to(tensor.dtype).view(shape)
        return tensor

    def _dim(self, dim: Dim, masks: Masks) -> Tensor:
        """The mask of one dimension: products of factors, segments one after another."""
        return torch.cat([self._segment(segment, masks) for segment in dim])

    def _segment(self, segment: tuple[str, ...], masks: Masks) -> Tensor:
        mask = self._ones(1)
        for symbol in segment:
            mask = (mask[:, None] * self._units(symbol, masks)).flatten()
        return mask

    def _units(self, symbol: str, masks: Masks) -> Tensor:
        if symbol in masks:
            return masks[symbol]
        return self._ones(width(((symbol,),), self.layout.sizes))

    def _ones(self, count: int) -> Tensor:
        return self.masks["layer"][0].new_ones(count)

    def _kept(self, dim: Dim, masks: Masks) -> Tensor:
        """The share of a dimension that is kept."""
        return self._dim(dim, masks).mean()

    @property
    def _experts(self) -> str:
        return self.layout.family.experts or ""


def hard_masks(layout: Layout, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Ones where a submodel is and zeros elsewhere, for all symbols that its fields shrink."""
    child = layout.sizes_of(fields)
    masks: dict[str, Any] = {"layer": [torch.tensor(float(there)) for there in child["layer"]]}
    for symbol in (symbol_of(layout.family, axis) for axis in layout.axes if axis != DEPTH):
        whole = layout.sizes[symbol]
        if child[symbol] == whole:
            continue
        values = child[symbol] if isinstance(child[symbol], list) else [child[symbol]]
        ones = [(torch.arange(whole) < value).float() for value in values]
        masks[symbol] = ones if isinstance(child[symbol], list) else ones[0]
    return masks


def masked_skeleton(layout: Layout) -> PreTrainedModel:
    """The full size on `meta`, its norms and gates ready for what `Masked` hands them."""
    model = stock.use_chunk_scan(stock.build_child(layout, {}))
    for name, module in model.named_modules():
        if f"{name}.weight".endswith(tuple(layout.family.norms)) and hasattr(
            module, "variance_epsilon"
        ):
            _scale_epsilon(module)
        if name.endswith(".gate"):
            module.register_buffer("kept_experts", torch.empty(0), persistent=False)
            module.register_buffer("kept_ranks", torch.empty(0), persistent=False)
            module.register_forward_hook(_pick_kept)
    return model


def _scale_epsilon(norm: nn.Module) -> None:
    """RMS over zeros: eps * kept inside, and sqrt(kept) on the weight, equal the smaller norm's."""
    epsilon = cast(float, norm.variance_epsilon)
    del norm.variance_epsilon
    norm.register_buffer("kept_width", torch.empty(()), persistent=False)
    scaled = property(lambda self: epsilon * self.kept_width)
    norm.__class__ = type(type(norm).__name__, (type(norm),), {"variance_epsilon": scaled})


def _pick_kept(gate: Any, _: Any, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """The stock gate's choice (Qwen3MoeTopKRouter, NemotronHTopkRouter) among kept experts only.

    Scores are multiplied by the expert's mask before the best are taken, weights by the rank's.
    """
    logits, stock_weights, stock_picked = output
    kept = gate.kept_experts
    if hasattr(gate, "e_score_correction_bias"):
        scores = logits.sigmoid() * kept
        choice = scores + gate.e_score_correction_bias * kept
    else:
        best = logits.float().masked_fill(kept == 0, -torch.inf).amax(-1, keepdim=True)
        odds = (logits.float() - best).clamp(max=_MOST).exp() * kept
        scores = choice = odds / odds.sum(-1, keepdim=True)
    choice = choice.detach().masked_fill(kept == 0, -torch.inf)
    if getattr(gate, "num_group", 1) > 1:  # experts are no axis then, and the stock picks hold
        best_first = choice.gather(1, stock_picked).argsort(-1, descending=True)
        picked = stock_picked.gather(1, best_first)
    else:
        picked = choice.topk(gate.top_k, dim=-1).indices
    weights = scores.gather(1, picked) * gate.kept_ranks
    if gate.norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    weights = weights * getattr(gate, "routed_scaling_factor", 1.0)
    return logits, weights.to(stock_weights.dtype), picked
