"""Layouts against the stock classes: names, shapes, counts and memory."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import (
    CONFIGS,
    FAMILIES,
    ORDER,
    SMALL,
    child_config,
    layout_of,
    tiny,
    tiny_config,
    token_ids,
)
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from bench.nano import nano_config
from star_elastic.layout import Layout
from star_elastic.shapes import narrow
from star_elastic.symbols import DEPTH

_MAMBA = {"mamba_num_heads", "mamba_head_dim"}
_MOE = {"moe_intermediate_size", "n_routed_experts", "num_experts_per_tok"}
_SHARED = {"moe_shared_expert_intermediate_size"}
AXES = {
    "nemotron_h": {"hidden_size", "intermediate_size", "num_attention_heads"}
    | _MAMBA
    | _MOE
    | _SHARED,
    "nemotron_h-latent": {"hidden_size", "intermediate_size", "num_attention_heads"}
    | {"moe_latent_size"}
    | _MAMBA
    | _MOE
    | _SHARED,
    "qwen3_moe": {"hidden_size", "intermediate_size", "num_attention_heads"}
    | {"moe_intermediate_size", "num_experts", "num_experts_per_tok"},
}
_DENSE_AXES = {"hidden_size", "intermediate_size", "num_attention_heads"}


def nano() -> Layout:
    """Nemotron 3 Nano 30B-A3B."""
    return Layout(nano_config())


def in_memory(model: PreTrainedModel) -> dict[str, Tensor]:
    """The distinct tensors of a state dict: a tied one is there once."""
    kept = model.state_dict().keys()
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor for name, tensor in named if name in kept}


def active_parameters(model: PreTrainedModel) -> int:
    """Parameters a token uses, counted on the modules: its share of the routed experts."""
    used = sum(p.numel() for p in model.parameters())
    for module in model.modules():
        if type(module).__name__.endswith("Experts"):
            for stacked in module.parameters():
                idle = len(stacked) - model.config.num_experts_per_tok
                used -= idle * stacked[0].numel()
    return used


def test_counts_of_the_published_parent() -> None:
    layout = nano()
    assert layout.count() == 31_577_937_344
    assert layout.count_active() == 3_580_073_408


def test_counts_of_a_smaller_size() -> None:
    layout = nano()
    sizes = layout.sizes_of({"hidden_size": 1920, "moe_intermediate_size": 960})
    assert layout.count(sizes) == 12_426_655_424
    assert layout.count_active(sizes) == 2_082_617_024
    assert layout.cache_bytes_per_token(sizes) == 6144


def test_memory_of_the_published_parent() -> None:
    # 6 attention layers of 2 x 256 bf16; 23 mixers of 6144 x 4 bf16 and 64 x 64 x 128 fp32
    held = {"kv": 6144 * 1000 * 3, "conv": 3 * 23 * 6144 * 4 * 2, "ssm": 3 * 23 * 64 * 64 * 128 * 4}
    assert nano().cache_bytes(context=1000, batch=3) == held
    assert nano().memory(context=1000, batch=3) == 2 * 31_577_937_344 + sum(held.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_shapes_are_the_stock_ones(family: str) -> None:
    layout = layout_of(family)
    stock = {name: tuple(tensor.shape) for name, tensor in in_memory(tiny(family)).items()}
    assert {name: w.shape(layout.sizes) for name, w in layout.weights.items()} == stock


@pytest.mark.parametrize("family", FAMILIES)
def test_buffers_are_told_from_parameters(family: str) -> None:
    layout, parameters = layout_of(family), dict(tiny(family).named_parameters())
    assert {n for n, w in layout.weights.items() if not w.is_buffer} == parameters.keys()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("small", [False, True])
def test_counts_are_those_of_the_stock_modules(family: str, small: bool) -> None:
    layout, fields = layout_of(family), SMALL[family] if small else {}
    with torch.device("meta"):
        stock = AutoModelForCausalLM.from_config(child_config(family, fields))
    sizes = layout.sizes_of(fields)
    assert layout.count(sizes) == sum(p.numel() for p in stock.parameters())
    assert layout.count_active(sizes) == active_parameters(stock)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_count_is_the_number_of_elements_kept(family: str, data: st.DataObject) -> None:
    layout = layout_of(family)
    sizes = layout.sizes_of(data.draw(smaller_fields(family)))
    kept = {
        weight: narrow(
            torch.empty(weight.shape(layout.sizes), device="meta"),
            weight.cuts(layout.sizes, sizes),
        )
        for _, weight in layout.kept(sizes, layout.weights)
    }
    for weight, tensor in kept.items():
        assert tuple(tensor.shape) == weight.shape(sizes)
    assert layout.count(sizes) == sum(t.numel() for w, t in kept.items() if not w.is_buffer)


@st.composite
def smaller_fields(draw: st.DrawFn, family: str) -> dict[str, int]:
    """Any size that a parent can hold; heads come in multiples of their groups."""
    fields = {}
    for field in SMALL[family]:
        step = {"num_attention_heads": 2, "mamba_num_heads": 2}.get(field, 1)
        parent = len(ORDER[family]) if field == DEPTH else CONFIGS[family][field]
        most = parent // step
        fields[field] = step * draw(st.integers(1, most), label=field)
    return fields


@pytest.mark.parametrize("family", FAMILIES)
def test_stored_names_are_those_that_save_pretrained_writes(family: str, tmp_path: Path) -> None:
    tiny(family).save_pretrained(tmp_path)
    written = {n: tuple(t.shape) for n, t in load_file(tmp_path / "model.safetensors").items()}
    layout = layout_of(family)
    assert {name: w.shape(layout.sizes) for name, w in layout.stored.items()} == written


@pytest.mark.parametrize("family", FAMILIES)
def test_stored_tensors_cover_every_element_once(family: str) -> None:
    layout = layout_of(family)
    places = {
        name: torch.arange(math.prod(w.shape(layout.sizes))).view(w.shape(layout.sizes))
        for name, w in layout.weights.items()
    }
    seen: dict[str, list[Tensor]] = {name: [] for name in places}
    for weight in layout.stored.values():
        part = layout.view(places, weight)
        assert tuple(part.shape) == weight.shape(layout.sizes)
        seen[weight.place[0]].append(part.flatten())
    for name, parts in seen.items():
        assert torch.equal(torch.cat(parts).sort().values, places[name].flatten())


@pytest.mark.parametrize("family", FAMILIES)
def test_stored_tensors_hold_what_save_pretrained_writes(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    model.save_pretrained(tmp_path)
    layout, state = Layout(model.config), in_memory(model)
    written = load_file(tmp_path / "model.safetensors")
    for name, weight in layout.stored.items():
        assert torch.equal(layout.view(state, weight), written[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_axes(family: str) -> None:
    expected = AXES.get(family, _DENSE_AXES)
    assert set(layout_of(family).axes) == expected | {DEPTH}
    assert set(Layout(tiny_config(family)).axes) == expected  # depth wants its layers ranked


@pytest.mark.parametrize(
    ("pattern", "lacking"),
    [
        ("ME*", {"intermediate_size"}),
        ("M-*", _MOE | _SHARED),
        ("ME-", {"num_attention_heads"}),
        ("E*-", _MAMBA),
    ],
)
def test_axes_follow_the_blocks_there_are(pattern: str, lacking: set[str]) -> None:
    layout = Layout(tiny_config("nemotron_h", hybrid_override_pattern=pattern))
    assert set(layout.axes) == AXES["nemotron_h"] - lacking


def test_gate_groups_forbid_dropping_experts() -> None:
    layout = Layout(tiny_config("nemotron_h", n_group=2, topk_group=1))
    assert set(layout.axes) == AXES["nemotron_h"] - {"n_routed_experts"}


def test_qwen3_moe_without_dense_layers_has_no_dense_width() -> None:
    layout = Layout(tiny_config("qwen3_moe", mlp_only_layers=[]))
    assert set(layout.axes) == AXES["qwen3_moe"] - {"intermediate_size"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_cache_bytes_are_those_a_stock_cache_holds(family: str, dtype: torch.dtype) -> None:
    model, ids = tiny(family).to(dtype), token_ids(rows=3, length=11)
    cache = model(input_ids=ids, use_cache=True).past_key_values
    predicted = Layout(model.config).cache_bytes(11, batch=3, dtype=str(dtype)[6:])
    assert predicted == held_bytes(cache)


def held_bytes(cache: Any) -> dict[str, int]:
    """Bytes of the tensors in a `DynamicCache`, by kind."""
    held = {"kv": 0, "conv": 0, "ssm": 0}
    for layer in cache.layers:
        tensors = {"kv": [getattr(layer, "keys", None), getattr(layer, "values", None)]}
        tensors["conv"] = [*getattr(layer, "conv_states", {}).values()]
        tensors["ssm"] = [*getattr(layer, "recurrent_states", {}).values()]
        for kind, found in tensors.items():
            held[kind] += sum(t.nbytes for t in found if t is not None)
    return held


@pytest.mark.parametrize("family", FAMILIES)
def test_count_is_differentiable(family: str) -> None:
    layout = layout_of(family)
    sizes = {
        symbol: torch.tensor(float(value), dtype=torch.float64, requires_grad=True)
        for symbol, value in layout.sizes.items()
        if isinstance(value, int)
    }
    everywhere = {"layer": layout.sizes["layer"]}
    for count in (layout.count, layout.count_active):
        total = count(sizes | everywhere)
        assert total.item() == count()
        gradients = torch.autograd.grad(total, [*sizes.values()], allow_unused=True)
        for symbol, gradient in zip(sizes, gradients, strict=True):
            expected = central_difference(count, layout.sizes, symbol)
            assert float(gradient if gradient is not None else 0) == pytest.approx(expected), symbol


def central_difference(count: Any, sizes: dict[str, int], symbol: str) -> float:
    """Exact for counts: no symbol enters them with a higher power than two."""
    around = [{**sizes, symbol: sizes[symbol] + step} for step in (1, -1)]
    return (count(around[0]) - count(around[1])) / 2


def test_heads_must_fill_their_groups() -> None:
    layout = Layout(tiny_config("nemotron_h"))
    with pytest.raises(ValueError, match="mamba_num_heads = 3 does not divide into n_groups = 2"):
        layout.sizes_of({"mamba_num_heads": 3})


def test_an_unknown_family_is_named() -> None:
    class Config:
        model_type = "gpt2"

    with pytest.raises(ValueError, match="'gpt2' has no table; known: llama, nemotron_h"):
        Layout(Config())
