"""The parent under masks is its slice, on every family, with every axis cut at once (I3)."""

from typing import Any

import pytest
import torch
from models import CONFIGS, FAMILIES, ORDER, SMALL, elastic, logits, tiny, token_ids
from torch import Tensor

from star_elastic import stock
from star_elastic.model import ElasticModel
from star_elastic.symbols import DEPTH
from star_elastic.train.masks import Masked, hard_masks, masked_skeleton
from star_elastic.train.parts import Narrowed, Parts


def run(parts: Parts, skeleton: Any, cut: Any, ids: Tensor) -> Tensor:
    return parts(skeleton, cut, lambda hidden, head: hidden @ head.T, input_ids=ids)


def masked(model: ElasticModel, fields: dict[str, Any], ids: Tensor) -> Tensor:
    parts = Parts(model.layout, model.state)
    skeleton = parts.connect(masked_skeleton(model.layout), range(len(model.layout.blocks)))
    return run(parts, skeleton, Masked(model.layout, hard_masks(model.layout, fields)), ids)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_masked_parent_is_its_slice(family: str) -> None:
    model, ids = elastic(family), token_ids()
    expected = logits(model["small"], ids)
    torch.testing.assert_close(masked(model, SMALL[family], ids), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_each_axis_alone(family: str) -> None:
    model, ids = elastic(family), token_ids()
    whole = logits(model.parent, ids)
    for field, value in SMALL[family].items():
        found, expected = masked(model, {field: value}, ids), model.submodel(**{field: value})
        torch.testing.assert_close(
            found, logits(expected, ids), atol=2e-5, rtol=1e-4, msg=lambda m, f=field: f"{f}: {m}"
        )
        assert not torch.allclose(found, whole, atol=1e-3), field


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_masks_per_layer(family: str) -> None:
    model, ids = elastic(family), token_ids()
    fields = {
        field: ([CONFIGS[family][field], value] * 3)[: len(ORDER[family])]
        for field, value in SMALL[family].items()
        if field not in ("hidden_size", DEPTH)
    }
    expected = logits(model.submodel(**fields), ids)
    torch.testing.assert_close(masked(model, fields, ids), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_parts_narrowed_are_the_view(family: str) -> None:
    model, ids = elastic(family), token_ids()
    parts = Parts(model.layout, model.state)
    for size in model.sizes.values():
        cut = Narrowed(model.layout, model.layout.sizes_of(size.config))
        view = stock.use_chunk_scan(model.submodel(**size.config).train())
        found = run(parts, parts.skeleton(size.config), cut, ids)
        torch.testing.assert_close(found, logits(view, ids), atol=1e-5, rtol=1e-5)


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("nemotron_h", {"norm_topk_prob": False}),
    ("nemotron_h", {"n_group": 2, "topk_group": 1}),
    ("nemotron_h", {"use_conv_bias": False, "mlp_bias": True, "use_bias": True}),
    ("nemotron_h", {"n_groups": 4}),
    ("qwen3_moe", {"norm_topk_prob": False}),
    ("qwen3_moe", {"attention_bias": True, "mlp_only_layers": []}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen3", {"num_key_value_heads": 4}),
]


@pytest.mark.parametrize(("family", "changes"), VARIANTS, ids=str)
@torch.no_grad()
def test_variants_of_a_family(family: str, changes: dict[str, Any]) -> None:
    model = ElasticModel(tiny(family, **changes), layer_order=ORDER[family])
    fields = {axis: value for axis, value in SMALL[family].items() if axis in model.layout.axes}
    ids = token_ids()
    for each in ({}, fields):
        expected = logits(model.submodel(**each), ids)
        torch.testing.assert_close(masked(model, each, ids), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_soft_masks_on_all_axes(family: str) -> None:
    """Every size is a mask's end; in between nothing is at either end, and all is finite."""
    model, ids = elastic(family), token_ids()
    parts = Parts(model.layout, model.state)
    skeleton = parts.connect(masked_skeleton(model.layout), range(len(model.layout.blocks)))
    small = hard_masks(model.layout, SMALL[family])
    leaves: list[Tensor] = []

    def soft(share: float) -> dict[str, Any]:
        made = {s: (1 - share) * mask + share for s, mask in small.items() if s != "layer"}
        made["layer"] = [(1 - share) * mask + share for mask in small["layer"]]
        leaves[:] = [m for s, m in made.items() if s != "layer"] + made["layer"]
        for leaf in leaves:
            leaf.requires_grad_(True)
        return made

    found = {
        share: run(parts, skeleton, Masked(model.layout, soft(share)), ids)
        for share in (0.0, 1.0, 0.5, 1e-3)
    }
    ends = logits(model["small"], ids), logits(model.parent, ids)
    for share, end in zip((0.0, 1.0), ends, strict=True):
        torch.testing.assert_close(found[share], end, atol=2e-5, rtol=1e-4)
        assert not torch.allclose(found[0.5], end, atol=1e-3)
    found[1e-3].square().mean().backward()
    assert all(leaf.grad is not None and torch.isfinite(leaf.grad).all() for leaf in leaves)


@pytest.mark.parametrize("family", ["nemotron_h", "qwen3_moe"])
@torch.no_grad()
def test_the_gate_cannot_pick_a_dropped_expert(family: str) -> None:
    """Even one whose score is the highest by far."""
    model, ids = elastic(family), token_ids()
    axis = model.layout.family.experts or ""
    for name, tensor in model.state.items():
        if name.endswith("gate.weight"):
            tensor[-1] = 100 * tensor[0]
            tensor[-2] = -100 * tensor[0]
        if name.endswith("e_score_correction_bias"):
            tensor[-2:] = 50.0
    assert not torch.allclose(masked(model, {axis: 4}, ids), logits(model.parent, ids), atol=1e-3)
    expected = logits(model.submodel(**{axis: 4}), ids)
    torch.testing.assert_close(masked(model, {axis: 4}, ids), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_masks_have_gradients_where_units_are_dropped(family: str) -> None:
    """A unit at 0 must feel what it would add, or no router could bring it back."""
    model, ids = elastic(family), token_ids()
    gate_axes = {model.layout.family.experts, model.layout.family.top_k}
    parts = Parts(model.layout, model.state)
    skeleton = parts.connect(masked_skeleton(model.layout), range(len(model.layout.blocks)))
    masks = hard_masks(model.layout, SMALL[family])
    leaves = {s: m.requires_grad_(True) for s, m in masks.items() if s != "layer"}
    masks["layer"] = [m.requires_grad_(True) for m in masks["layer"]]
    run(parts, skeleton, Masked(model.layout, masks), ids).square().mean().backward()
    for symbol, mask in leaves.items():
        assert mask.grad is not None and torch.isfinite(mask.grad).all(), symbol
        if symbol not in gate_axes:
            assert mask.grad[mask == 0].abs().min() > 0, symbol
    assert all(mask.grad is not None and mask.grad.abs() > 0 for mask in masks["layer"])


def test_a_soft_mask_is_between_the_slices() -> None:
    model, ids = ElasticModel(tiny("llama")), token_ids()
    parts = Parts(model.layout, model.state)
    skeleton = parts.connect(masked_skeleton(model.layout), range(len(model.layout.blocks)))
    few, many = (hard_masks(model.layout, {"intermediate_size": n}) for n in (8, 16))
    with torch.no_grad():
        found = {
            share: run(
                parts,
                skeleton,
                Masked(model.layout, {**few, "intermediate_size": mixed}),
                ids,
            )
            for share in (0.0, 0.5, 1.0)
            for mixed in [
                (1 - share) * few["intermediate_size"] + share * many["intermediate_size"]
            ]
        }
    gaps = [(found[0.5] - found[end]).norm() for end in (0.0, 1.0)]
    assert 0 < max(gaps) < (found[0.0] - found[1.0]).norm()
