"""Scores against activations captured here, and reordering that keeps the function (I1)."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import FAMILIES, logits, tiny, token_ids
from torch import Tensor, nn
from transformers import PreTrainedModel

from star_elastic import rank
from star_elastic.layout import Layout
from star_elastic.symbols import symbol_of

NORMS = ("layernorm", ".norm", "norm_f")  # not the query and key norms, nor the gated one
MIXERS = [family for family in FAMILIES if family.startswith("nemotron_h")]
EXPERTS = {"nemotron_h": "n_routed_experts", "nemotron_h-latent": "n_routed_experts"} | {
    "qwen3_moe": "num_experts"
}


def scored(model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None) -> rank.Scores:
    return rank.score(model, [(ids, torch.ones_like(ids) if mask is None else mask)])


def random_orders(model: PreTrainedModel, seed: int = 1) -> rank.Order:
    draw = torch.Generator().manual_seed(seed)
    scores = scored(model, token_ids())
    return rank.order({k: torch.rand(v.shape, generator=draw) for k, v in scores.items()})


@torch.no_grad()
def captured(
    model: PreTrainedModel, ids: Tensor, wanted: Callable[[str, nn.Module], bool]
) -> dict[str, tuple[Any, Any]]:
    """(inputs, output) of the wanted modules in one forward pass."""
    seen: dict[str, tuple[Any, Any]] = {}

    def listen(name: str, module: nn.Module) -> Any:
        def hook(_: nn.Module, inputs: Any, output: Any) -> None:
            seen[name] = (inputs, output)

        return module.register_forward_hook(hook)

    hooks = [listen(name, module) for name, module in model.named_modules() if wanted(name, module)]
    model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def layer_of(name: str) -> int:
    return int(name.split("layers.")[1].split(".")[0])


def inputs_of(model: PreTrainedModel, ids: Tensor, ending: str) -> dict[int, Tensor]:
    """(tokens, width) inputs of all modules with this name, by layer."""
    seen = captured(model, ids, lambda name, module: name.endswith(ending))
    return {layer_of(name): inputs[0].flatten(0, 1) for name, (inputs, _) in seen.items()}


def close(found: Tensor, expected: Any, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance, check_dtype=False)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("real_scores", [True, False])
def test_reordering_keeps_the_function(family: str, real_scores: bool) -> None:
    model, ids = tiny(family), token_ids(rows=3)
    before = logits(model, ids)
    orders = rank.order(scored(model, ids)) if real_scores else random_orders(model)
    rank.reorder(model, orders)
    torch.testing.assert_close(logits(model, ids), before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_axis_is_scored_in_every_layer_that_has_it(family: str) -> None:
    model = tiny(family)
    layout = Layout(model.config)
    scored_keys = scored(model, token_ids()).keys()
    for axis in set(layout.axes) - {layout.family.top_k, "hidden_size"}:
        symbol = symbol_of(layout.family, axis)
        layers = {w.layer for w in layout.weights.values() for d in w.dims if in_dim(symbol, d)}
        assert {layer for layer, scored in scored_keys if scored == symbol} == layers, axis
    assert (None, "hidden_size") in scored_keys


def in_dim(symbol: str, dim: Any) -> bool:
    return any(symbol in segment for segment in dim)


@pytest.mark.parametrize("family", FAMILIES)
def test_reordering_moves_hidden_channels(family: str) -> None:
    model = tiny(family)
    before = model.get_input_embeddings().weight.clone()
    orders = random_orders(model)
    rank.reorder(model, orders)
    after = model.get_input_embeddings().weight
    assert torch.equal(after, before[:, orders[None, "hidden_size"]])


@pytest.mark.parametrize("family", MIXERS)
def test_mamba_heads_move_only_within_their_group(family: str) -> None:
    model = tiny(family)
    mixer = model.get_submodule("model.layers.0.mixer")
    before = mixer.A_log.view(2, 4).clone()
    orders = random_orders(model)
    rank.reorder(model, orders)
    assert orders[0, "mamba_heads"].shape == (2, 4)
    assert torch.equal(mixer.A_log.view(2, 4), before.gather(1, orders[0, "mamba_heads"]))


@pytest.mark.parametrize("family", FAMILIES)
def test_query_heads_move_only_within_their_kv_head(family: str) -> None:
    model = tiny(family)
    orders = random_orders(model)
    layer = next(layer for layer, symbol in orders if symbol == "queries")
    (name,) = [n for n, _ in model.named_modules() if n.endswith(f".{layer}.mixer.q_proj")] or [
        f"model.layers.{layer}.self_attn.q_proj"
    ]
    weight = model.get_submodule(name).weight
    kv_heads, queries = orders[layer, "queries"].shape
    keep_columns = {k: v for k, v in orders.items() if k == (layer, "queries")}
    before = weight.view(kv_heads, queries, -1).clone()
    rank.reorder(model, keep_columns)
    after = weight.view(kv_heads, queries, -1)
    assert kv_heads == 2
    for group, order in enumerate(keep_columns[layer, "queries"]):
        assert torch.equal(after[group], before[group, order])


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_move_with_their_gate(family: str) -> None:
    model = tiny(family)
    orders = random_orders(model)
    layer = next(layer for layer, symbol in orders if symbol == EXPERTS[family])
    only = {(layer, EXPERTS[family]): orders[layer, EXPERTS[family]]}
    names = [n for n, _ in model.named_parameters() if f".{layer}." in n and ".experts." in n]
    names += [n for n in model.state_dict() if f".{layer}." in n and ".gate." in n]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rank.reorder(model, only)
    for name, tensor in model.state_dict().items():
        expected = before[name][orders[layer, EXPERTS[family]]] if name in names else before[name]
        assert torch.equal(tensor, expected), name
    assert len(names) == 4 - (family == "qwen3_moe")


@pytest.mark.parametrize("family", FAMILIES)
def test_an_axis_without_an_order_keeps_its_own(family: str) -> None:
    model = tiny(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rank.reorder(model, {})
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_best_first_and_ties_keep_their_place() -> None:
    scores = {(0, "x"): torch.tensor([1.0, 3.0, 1.0, 3.0, 2.0])}
    assert rank.order(scores)[0, "x"].tolist() == [1, 3, 4, 0, 2]


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_scores(family: str) -> None:
    model, ids = tiny(family), token_ids()
    seen = captured(model, ids, lambda n, m: n.endswith(NORMS) and ".mixer." not in n)
    expected = sum(output.double().abs().sum((0, 1)) for _, output in seen.values())
    norms = {"llama": 5, "llama-tied": 5, "qwen2": 5, "qwen3": 5, "qwen3_moe": 7}
    assert len(seen) == norms.get(family, len(model.model.layers) + 1)
    close(scored(model, ids)[None, "hidden_size"], expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_ffn_scores(family: str) -> None:
    model, ids = tiny(family), token_ids()
    scores = scored(model, ids)
    endings = ("mixer.down_proj", "mlp.down_proj")
    seen = {
        layer: units for ending in endings for layer, units in inputs_of(model, ids, ending).items()
    }
    assert {layer for layer, symbol in scores if symbol == "intermediate_size"} == seen.keys()
    for layer, units in seen.items():
        close(scores[layer, "intermediate_size"], units.double().abs().sum(0))


@pytest.mark.parametrize("family", MIXERS)
def test_shared_expert_scores(family: str) -> None:
    model, ids = tiny(family), token_ids()
    scores = scored(model, ids)
    for layer, units in inputs_of(model, ids, "shared_experts.down_proj").items():
        found = scores[layer, "moe_shared_expert_intermediate_size"]
        close(found, units.double().abs().sum(0))


def test_latent_scores() -> None:
    model, ids = tiny("nemotron_h-latent"), token_ids()
    scores = scored(model, ids)
    seen = captured(model, ids, lambda name, module: name.endswith("fc1_latent_proj"))
    assert {layer for layer, symbol in scores if symbol == "moe_latent_size"} == {
        layer_of(name) for name in seen
    }
    for name, (_, output) in seen.items():
        close(
            scores[layer_of(name), "moe_latent_size"], output.flatten(0, -2).double().abs().sum(0)
        )


def test_sums_of_a_bfloat16_model_are_not_rounded_to_its_dtype() -> None:
    model, ids = tiny("nemotron_h").bfloat16(), token_ids(rows=8)
    scores = scored(model, ids)
    for layer, units in inputs_of(model, ids, "mixer.down_proj").items():
        close(scores[layer, "intermediate_size"], units.double().abs().sum(0), 1e-6)
    for layer, units in inputs_of(model, ids, "o_proj").items():
        heads = units.double().view(len(units), 2, -1, 8)
        close(scores[layer, "queries"], heads.norm(dim=3).norm(dim=0), 1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_head_scores(family: str) -> None:
    model, ids = tiny(family), token_ids()
    scores = scored(model, ids)
    seen = inputs_of(model, ids, "o_proj")
    assert {layer for layer, symbol in scores if symbol == "queries"} == seen.keys()
    for layer, units in seen.items():
        heads = units.double().view(len(units), 2, -1, 8)  # tokens, KV heads, queries, channels
        close(scores[layer, "queries"], heads.norm(dim=3).norm(dim=0))


@pytest.mark.parametrize("family", MIXERS)
def test_mamba_scores(family: str) -> None:
    model, ids = tiny(family), token_ids()
    scores = scored(model, ids)
    seen = captured(model, ids, lambda name, module: name.endswith("in_proj"))
    for name, (_, output) in seen.items():
        x = output.double()[..., 32:64].reshape(-1, 2, 4, 4)  # tokens, groups, heads, channels
        layer = layer_of(name)
        close(scores[layer, "mamba_heads"], x.norm(dim=3).norm(dim=0))
        close(scores[layer, "mamba_head_dim"], x.flatten(0, 2).norm(dim=0))


@pytest.mark.parametrize("family", EXPERTS)
def test_expert_scores(family: str) -> None:
    model, ids = tiny(family), token_ids()
    scores = scored(model, ids)
    seen = captured(model, ids, lambda name, module: name.endswith(".experts"))
    for name, ((hidden, chosen, gates), _) in seen.items():
        reap, channels = expert_scores(model.get_submodule(name), hidden, chosen, gates)
        layer = layer_of(name)
        close(scores[layer, EXPERTS[family]], reap)
        close(scores[layer, "moe_intermediate_size"], channels)


def expert_scores(
    module: Any, hidden: Tensor, chosen: Tensor, gates: Tensor
) -> tuple[Tensor, Tensor]:
    """Token by token: mean of normalised gate * ||output||, and sums of |inner channels|."""
    experts = len(module.down_proj)
    reap, tokens = torch.zeros(experts), torch.zeros(experts)
    channels = torch.zeros(experts, module.down_proj.shape[2])
    for x, picks, weights in zip(hidden, chosen, gates, strict=True):
        for expert, gate in zip(picks.tolist(), weights / weights.sum(), strict=True):
            inner = expert_inner(module, expert, x)
            reap[expert] += gate * (module.down_proj[expert] @ inner).norm()
            tokens[expert] += 1
            channels[expert] += inner.abs()
    return reap.detach() / tokens.clamp(min=1), channels.detach()


def expert_inner(module: Any, expert: int, x: Tensor) -> Tensor:
    if hasattr(module, "gate_up_proj"):
        gate, up = (module.gate_up_proj[expert] @ x).chunk(2)
        return F.silu(gate) * up
    return F.relu(module.up_proj[expert] @ x) ** 2


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_does_not_count(family: str) -> None:
    model, ids = tiny(family), token_ids(rows=2, length=13)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    padded = scored(model, ids, mask)
    rows = [(ids[:1], mask[:1]), (ids[1:, :6], mask[1:, :6])]
    same(padded, rank.score(model, rows))


@pytest.mark.parametrize("family", FAMILIES)
def test_two_batches_score_as_one(family: str) -> None:
    model, ids = tiny(family), token_ids(rows=4)
    ones = torch.ones_like(ids)
    halves = [(ids[:1], ones[:1]), (ids[1:], ones[1:])]
    same(rank.score(model, halves), scored(model, ids))


def same(found: rank.Scores, expected: rank.Scores) -> None:
    assert found.keys() == expected.keys()
    for key in expected:
        close(found[key], expected[key], tolerance=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_scoring_leaves_the_model_as_it_was(family: str) -> None:
    model = tiny(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scored(model, token_ids())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())
