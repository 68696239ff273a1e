"""The router: distributions, expected sizes that are exact, budgets that are kept."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import FAMILIES, ORDER, SMALL, layout_of
from safetensors.torch import load_file, save_file
from torch import Tensor

from star_elastic.budget import LatencyTable, Metric
from star_elastic.folder import CheckpointError
from star_elastic.layout import Layout
from star_elastic.submodel import check_fields
from star_elastic.symbols import DEPTH
from star_elastic.train.masks import hard_masks
from star_elastic.train.recipe import Routing
from star_elastic.train.router import Router, load_router, save_router, warm_up

BUDGETS = [1.0, 0.7, 0.4]


def settings(family: str, **changes: Any) -> Routing:
    """Two choices on every axis: the small one and the parent's."""
    axes = {field: [value] for field, value in SMALL[family].items()}
    return Routing(**{"axes": axes, "width": 32, **changes})


def router(family: str, kind: Any = "active", **changes: Any) -> Router:
    metric = Metric(kind=kind, context=64, batch=2)
    return Router(layout_of(family), settings(family, **changes), metric, BUDGETS)


def wide(kind: Any = "active", **changes: Any) -> Router:
    """A parent and choices wide enough to come near any budget."""
    layout = layout_of("llama", hidden_size=64, intermediate_size=96)
    axes = {"hidden_size": [24, 32, 40, 48, 56], "intermediate_size": [32, 48, 64, 80]}
    metric = Metric(kind=kind, context=64, batch=2)
    return Router(layout, Routing(axes=axes, **changes), metric, BUDGETS)


def one_hot(made: Router, fields: dict[str, Any]) -> dict[str, Tensor]:
    """Certain choices, as probabilities."""
    found = {}
    for axis, choices in made.choices.items():
        value = fields.get(axis, made.layout.sizes[axis])
        values = value if isinstance(value, list) else [value]
        if axis in made.settings.per_layer and len(values) == 1:
            values = values * len(made.layout.blocks)
        found[axis] = torch.eye(len(choices))[[choices.index(n) for n in values]]
    return found


def reached(made: Router) -> set[str]:
    """The axes whose networks have a gradient, in both layers and finite."""
    gradients = {axis: [p.grad for p in net.parameters()] for axis, net in made.networks.items()}
    felt = {axis: [g for g in found if g is not None] for axis, found in gradients.items()}
    assert all(torch.isfinite(gradient).all() for found in felt.values() for gradient in found)
    return {axis for axis, found in felt.items() if sum(g.abs().max() > 0 for g in found) == 2}


def test_budgets_are_encoded_as_blends_of_their_neighbours() -> None:
    made = router("llama")
    assert [made.encode(budget).tolist() for budget in BUDGETS] == torch.eye(3).tolist()
    torch.testing.assert_close(made.encode(0.85), torch.tensor([0.5, 0.5, 0.0]))
    torch.testing.assert_close(made.encode(0.475), torch.tensor([0.0, 0.25, 0.75]))
    assert made.encode(0.1).tolist() == [0, 0, 1] and made.encode(2.0).tolist() == [1, 0, 0]


@pytest.mark.parametrize("family", FAMILIES)
def test_draws_are_distributions_that_a_seed_decides(family: str) -> None:
    made = router(family)
    draws = [made.draw(0.7, 0.5, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    for axis, choices in made.choices.items():
        assert draws[0][axis].shape == (1, len(choices))
        torch.testing.assert_close(draws[0][axis].sum(-1), torch.ones(1))
        assert torch.equal(draws[0][axis], draws[1][axis])
    assert any(not torch.equal(draws[0][axis], draws[2][axis]) for axis in made.choices)


def test_draws_become_choices() -> None:
    made = wide()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(4)

    def certain(done: float) -> float:
        draws = [made.draw(0.7, done, torch.Generator().manual_seed(n)) for n in range(40)]
        return sum(draw["hidden_size"].max().item() for draw in draws) / 40

    assert certain(0.0) < 0.75 < 0.97 < certain(1.0)
    counted = [made.draw(0.7, 1.0, torch.Generator().manual_seed(n)) for n in range(40)]
    favourite = made.logits(0.7)["hidden_size"].argmax()
    assert sum(draw["hidden_size"].argmax() == favourite for draw in counted) > 30


def test_hard_draws_are_one_hot_with_the_soft_gradient() -> None:
    soft, hard = wide(), wide(hard=1.0)
    hard.load_state_dict(soft.state_dict())
    draws = [made.draw(0.7, 0.3, torch.Generator().manual_seed(3)) for made in (soft, hard)]
    weights = torch.linspace(0, 1, len(soft.choices["hidden_size"]))
    gradients = []
    for made, draw in zip((soft, hard), draws, strict=True):
        (draw["hidden_size"][0] @ weights).backward()
        gradients.append(made.networks["hidden_size"][2].weight.grad)
    torch.testing.assert_close(*gradients)
    assert 0 < draws[0]["hidden_size"].max() < 1
    for seed in range(50):
        hard_draw = hard.draw(0.7, 0.3, torch.Generator().manual_seed(seed))["hidden_size"]
        assert sorted(hard_draw[0].tolist()) == [0, 0, 0, 0, 0, 1]  # not nearly: exactly


def test_hard_draws_come_as_often_as_asked() -> None:
    made = wide(hard=0.25)
    draws = [made.draw(0.7, 0.0, torch.Generator().manual_seed(n)) for n in range(200)]
    assert 0.15 < sum(draw["hidden_size"].max().item() == 1 for draw in draws) / 200 < 0.35


@pytest.mark.parametrize(
    ("done", "temperature", "scale"), [(0.0, 2.0, 1.0), (0.5, 1.0, 2.0), (1.0, 0.5, 3.0)]
)
def test_annealing_is_geometric_in_temperature_and_linear_in_scale(
    done: float, temperature: float, scale: float
) -> None:
    annealed = wide(temperature=(2.0, 0.5), scale=(1.0, 3.0))
    still = wide(temperature=(temperature, temperature), scale=(scale, scale))
    still.load_state_dict(annealed.state_dict())
    found, expected = (
        made.draw(0.7, when, torch.Generator().manual_seed(5))
        for made, when in ((annealed, done), (still, 0.0))
    )
    for axis in expected:
        torch.testing.assert_close(found[axis], expected[axis])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["params", "active", "memory"])
def test_the_expected_cost_of_a_certain_choice_is_its_cost(family: str, kind: str) -> None:
    made = router(family, kind)
    for fields in ({}, SMALL[family]):
        sizes = made.expected(one_hot(made, fields))
        true = made.metric.cost(made.layout, made.layout.sizes_of(fields))
        assert float(made.metric.cost(made.layout, sizes)) == pytest.approx(true, rel=1e-6)
        masks, expected = made.masks(one_hot(made, fields)), hard_masks(made.layout, fields)
        for symbol, mask in expected.items():
            assert torch.equal(torch.stack([*masks[symbol]]), torch.stack([*mask])), symbol


@pytest.mark.parametrize("family", ["nemotron_h", "qwen3_moe"])
def test_choices_per_layer(family: str) -> None:
    made = router(family, per_layer=["moe_intermediate_size", "num_attention_heads"])
    layers = len(made.layout.blocks)
    small = SMALL[family]["moe_intermediate_size"]
    fields = {
        "moe_intermediate_size": ([small, made.layout.sizes["moe_intermediate_size"]] * 3)[:layers]
    }
    sizes = made.expected(one_hot(made, fields))
    true = made.layout.count_active(made.layout.sizes_of(fields))
    assert float(made.metric.cost(made.layout, sizes)) == pytest.approx(true, rel=1e-6)
    chosen = made.fields(0.4)
    check_fields(made.layout, chosen)
    assert all(isinstance(chosen.get(axis, []), list) for axis in made.settings.per_layer)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["params", "active", "memory"])
def test_the_budget_loss_reaches_every_axis_that_costs(family: str, kind: str) -> None:
    made = router(family, kind)
    made.budget_loss(made.draw(0.4, 0.0, torch.Generator().manual_seed(0)), 0.4).backward()
    # how many experts a token uses takes no room; how many there are is active: the gate's rows
    free = set() if kind == "active" else {made.layout.family.top_k}
    assert reached(made) == set(made.choices) - free


def test_the_dead_zone_costs_nothing_and_the_whole_has_none() -> None:
    made = wide()
    near = {"hidden_size": 48}
    cost = made.metric.cost(made.layout, made.layout.sizes_of(near)) / made.whole
    assert made.budget_loss(one_hot(made, near), cost * 1.04).item() == 0
    assert made.budget_loss(one_hot(made, near), cost * 1.10).item() == pytest.approx(1 - 1 / 1.1)
    assert made.budget_loss(one_hot(made, {}), 1.0).item() == pytest.approx(0, abs=1e-6)
    anchored = made.budget_loss(one_hot(made, near), 1.0).item()
    assert anchored == pytest.approx(1 - cost + 10 * 2 / 6, rel=1e-4)  # two of six entries are off


@pytest.mark.parametrize("kind", ["params", "active", "memory"])
def test_the_warm_up_learns_the_budgets(kind: str) -> None:
    made = wide(kind)
    warm_up(made)
    costs = {}
    for budget in (1.0, 0.85, 0.7, 0.55, 0.4):
        check_fields(made.layout, made.fields(budget))
        sizes = made.layout.sizes_of(made.fields(budget))
        costs[budget] = made.metric.cost(made.layout, sizes) / made.whole
    assert made.fields(1.0) == {}
    assert costs[0.7] == pytest.approx(0.7, rel=0.15) and costs[0.4] == pytest.approx(0.4, rel=0.15)
    assert costs[0.4] <= costs[0.55] <= costs[0.7] <= costs[0.85] <= 1.0
    assert all(parameter.grad is None for parameter in made.parameters())


def test_a_router_comes_back(tmp_path: Path) -> None:
    made = router("nemotron_h", per_layer=["moe_intermediate_size"])
    warm_up(made)
    for name in ("a", "b"):
        save_router(made, tmp_path / name)
    again = load_router(tmp_path / "a", layout_of("nemotron_h"))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert again.settings == made.settings and again.metric == made.metric
    assert all(again.fields(n / 20) == made.fields(n / 20) for n in range(6, 21))


def test_a_budget_below_all_sizes_gets_the_cheapest() -> None:
    made = wide()
    assert made.fields(0.01) == {axis: choices[0] for axis, choices in made.choices.items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("uneven", [False, True])
def test_whatever_the_budget_the_sizes_exist(family: str, uneven: bool) -> None:
    whole = ("hidden_size", DEPTH)
    axes = [axis for axis in SMALL[family] if uneven and axis not in whole]
    made = router(family, per_layer=axes)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(20)
    for n in range(1, 24):
        check_fields(made.layout, made.fields(n / 20))


def latency() -> Metric:
    table = LatencyTable(
        device="a cpu",
        dtype="float32",
        mode="decode",
        batch=1,
        context=8,
        axes={"hidden_size": [24, 32], DEPTH: [1, 2]},
        milliseconds=[1.0, 2.0, 2.0, 5.0],
    )
    return Metric(kind="latency", table=table)


def test_milliseconds_can_be_the_budget(tmp_path: Path) -> None:
    made = Router(layout_of("llama"), settings("llama"), latency(), BUDGETS)
    for fields, true in (({}, 5.0), ({"hidden_size": 24}, 2.0), (SMALL["llama"], 1.0)):
        cost = made.metric.cost(made.layout, made.expected(one_hot(made, fields)))
        assert float(cost) == pytest.approx(true)
    made.budget_loss(made.draw(0.4, 0.0, torch.Generator().manual_seed(0)), 0.4).backward()
    assert reached(made) == {"hidden_size", DEPTH}
    save_router(made, tmp_path / "router")
    assert load_router(tmp_path / "router", made.layout).metric == made.metric


@pytest.mark.parametrize(
    "spoiled", ["parent", "wider", "order", "truncated", "metadata", "nan", "shape"]
)
def test_a_router_that_cannot_be_trusted(spoiled: str, tmp_path: Path) -> None:
    made, path, layout = router("llama"), tmp_path / "router.safetensors", layout_of("llama")
    save_router(made, path)
    tensors = load_file(path)
    if spoiled == "parent":
        layout = layout_of("qwen2")
    elif spoiled == "wider":  # it has all choices that the settings name
        layout = layout_of("llama", hidden_size=40)
    elif spoiled == "order":
        layout = Layout(layout.config, ORDER["llama"][::-1])
    elif spoiled == "truncated":
        path.write_bytes(path.read_bytes()[:-9])
    elif spoiled == "metadata":
        save_file(tensors, path, metadata={"other": json.dumps({})})
    else:
        name = "networks.hidden_size.2.weight"
        tensors[name] = (
            tensors[name] * torch.nan if spoiled == "nan" else tensors[name][:, 1:].contiguous()
        )
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            described = file.metadata()
        save_file(tensors, path, metadata=described)
    with pytest.raises(CheckpointError, match=r"router\.safetensors: ") as error:
        load_router(path, layout)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"axes": {"width": [8]}}, "width is no axis"),
        ({"axes": {"hidden_size": [80]}}, "hidden_size = 80 is larger than the parent's 32"),
        ({"per_layer": [DEPTH]}, "takes one value"),
        ({"per_layer": ["vocab_size"]}, "'vocab_size' is not among router.axes"),
        ({"axes": {"num_experts": [1]}}, "num_experts = 1 is fewer than num_experts_per_tok = 2"),
    ],
)
def test_a_router_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    family = "qwen3_moe" if "num_experts" in changes.get("axes", {}) else "llama"
    with pytest.raises(ValueError, match=message):
        router(family, **changes)


def test_axes_that_cost_nothing_serve_no_budget() -> None:
    axes = {"num_experts_per_tok": [1]}
    router("qwen3_moe", "active", axes=axes)
    with pytest.raises(ValueError, match="router.axes: num_experts_per_tok: .* total parameters"):
        router("qwen3_moe", "params", axes=axes)


@pytest.mark.parametrize("budgets", [[], [1.2], [0.5, 0.0]])
def test_budgets_are_shares(budgets: list[float]) -> None:
    with pytest.raises(ValueError, match="no shares of the parent"):
        Router(layout_of("llama"), settings("llama"), Metric(kind="active"), budgets)
