"""A router that learns beside a parent: nothing else moves, and it finds what is worth keeping."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from models import elastic, layout_of, same, tiny
from torch import Tensor
from training import stream

from star_elastic.budget import Metric
from star_elastic.model import ElasticModel
from star_elastic.train.distributed import World
from star_elastic.train.parts import Parts
from star_elastic.train.recipe import Distil, Routing
from star_elastic.train.router import Router, warm_up
from star_elastic.train.routing import RouterTraining
from star_elastic.train.teacher import Teacher


def routing(
    model: ElasticModel, axes: dict[str, list[int]], budgets: dict[str, float], **changes: Any
) -> RouterTraining:
    settings = Routing(axes=axes, width=32, **{"learning_rate": 0.05, **changes})
    router = Router(model.layout, settings, Metric(kind="active"), [*budgets.values()])
    warm_up(router)
    return RouterTraining(router, Parts(model.layout, model.state), budgets, seed=1)


def learn(trained: RouterTraining, teacher: Teacher, updates: int, first: int = 0) -> None:
    batches = stream()
    for number in range(first + updates):
        batch = next(batches)
        if number >= first:
            done = number / 40
            lesson = teacher.lesson(batch)
            trained.learn(batch, lesson, Distil(), done, number, 1.0, nullcontext())
            trained.update(World())


def snapshot(model: ElasticModel) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state.items()}


def teacher_of(model: ElasticModel) -> Teacher:
    return Teacher(Parts(model.layout, {n: t.clone() for n, t in snapshot(model).items()}))


@pytest.mark.parametrize("family", ["nemotron_h", "qwen3_moe"])
def test_the_parent_is_left_alone(family: str) -> None:
    model = elastic(family)
    model.parent.requires_grad_(True)
    before = snapshot(model)
    experts = model.layout.family.experts or ""
    axes = {
        "hidden_size": [16, 24],
        experts: [4],
        "num_hidden_layers": [len(model.layout.blocks) - 1],
    }
    trained = routing(model, axes, {"full": 1.0, "small": 0.6})
    routers = {n: p.detach().clone() for n, p in trained.router.named_parameters()}
    learn(trained, teacher_of(model), 4)
    same(snapshot(model), before)
    assert all(p.grad is None for p in model.parent.parameters())
    moved = {n for n, p in trained.router.named_parameters() if not torch.equal(p, routers[n])}
    assert moved == set(routers)
    assert all(torch.isfinite(p).all() for p in trained.router.parameters())


def test_what_is_useless_is_cut_first() -> None:
    """Half of the FFN adds nothing: the budget is better met there than in the hidden size."""
    model = ElasticModel(tiny("llama", hidden_size=64, intermediate_size=192))
    with torch.no_grad():
        for name, tensor in model.state.items():
            if name.endswith("down_proj.weight"):
                tensor[:, 48:] = 0
    axes = {"hidden_size": [40, 48, 56], "intermediate_size": [48, 96, 144]}
    trained = routing(model, axes, {"small": 0.64}, learning_rate=0.02)
    costs = {
        side: model.layout.count_active(model.layout.sizes_of(fields))
        for side, fields in {
            "thin": {"hidden_size": 40},
            "short": {"intermediate_size": 96},
        }.items()
    }
    assert abs(costs["thin"] / costs["short"] - 1) < 0.03  # either meets the budget
    learn(trained, teacher_of(model), 60)
    assert trained.router.fields(0.64) == {"intermediate_size": 96}


def test_it_learns_now_and_then_and_not_for_ever() -> None:
    trained = routing(elastic("llama"), {"hidden_size": [24]}, {"s": 0.6}, every=4, until=0.5)
    assert [n for n in range(12) if trained.learns(n, 0.1)] == [3, 7, 11]
    assert not any(trained.learns(n, 0.5) for n in range(12))


def test_sizes_settle_on_what_it_chooses() -> None:
    trained = routing(elastic("llama"), {"hidden_size": [16, 24]}, {"full": 1.0, "small": 0.6})
    sizes: dict[str, Any] = {"fixed": {"hidden_size": 8}}
    trained.settle(sizes)
    assert sizes == {
        "fixed": {"hidden_size": 8},
        "full": trained.router.fields(1.0),
        "small": trained.router.fields(0.6),
    }


def test_its_state_goes_on_bit_for_bit() -> None:
    def fresh() -> tuple[RouterTraining, Teacher]:
        model = elastic("nemotron_h")
        axes = {"hidden_size": [16, 24], "moe_intermediate_size": [8]}
        return routing(model, axes, {"full": 1.0, "small": 0.6}), teacher_of(model)

    whole, teacher = fresh()
    learn(whole, teacher, 6)
    first, _ = fresh()
    learn(first, teacher, 3)
    again, _ = fresh()
    with torch.no_grad():
        for name, tensor in again.state().items():
            tensor.copy_(first.state()[name])
    learn(again, teacher, 3, first=3)
    same(again.state(), whole.state())


def test_a_parent_without_ranked_layers_has_no_depth_to_route() -> None:
    layout = layout_of("llama")
    assert "num_hidden_layers" in layout.axes
    with pytest.raises(ValueError, match="no layer_order"):
        routing(ElasticModel(tiny("llama")), {"num_hidden_layers": [1]}, {"s": 0.6})
