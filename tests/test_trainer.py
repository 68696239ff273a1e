"""Joint training: the right gradients, the right draws, whatever the family."""

from pathlib import Path
from typing import Any

import pytest
import torch
from models import FAMILIES, SMALL, elastic, logits, same, standalone, tiny
from reference import cut
from torch import Tensor
from training import SIZES, one_batch, trainer, weights

from star_elastic import stock
from star_elastic.budget import Metric
from star_elastic.train.balance import Loads
from star_elastic.train.recipe import Balance, Routing
from star_elastic.train.router import Router
from star_elastic.train.routing import RouterTraining
from star_elastic.train.trainer import DivergedError, Trainer


def loss(trained: Trainer, size: str) -> Tensor:
    batch = one_batch()
    lesson = trained.teacher.lesson(batch) if trained.teacher else None
    return trained.loss(batch, trained.sizes[size], lesson, Loads())


def stock_loss(model: Any) -> Tensor:
    """Next-token loss of a stock model, each packed document by itself."""
    batch = one_batch()
    assert batch.documents is not None
    said, wanted = [], []
    for row in range(len(batch.input_ids)):
        for document in batch.documents[row].unique().tolist():
            inside = batch.documents[row] == document
            ids, targets = batch.input_ids[row, inside][None], batch.targets[row, inside]
            out = model(input_ids=ids, use_cache=False).logits[0, :-1]
            said.append(out[targets[1:]])
            wanted.append(ids[0, 1:][targets[1:]])
    return torch.nn.functional.cross_entropy(torch.cat(said), torch.cat(wanted))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", SIZES)
def test_gradients_are_those_of_a_model_of_that_size(family: str, size: str) -> None:
    model = elastic(family)
    state = {name: t.clone() for name, t in model.parent.state_dict().items()}
    trained, fields = trainer(family, model=model), model.sizes[size].config
    alone = standalone(family, fields, cut(family, state, fields)).requires_grad_(True)
    expected = stock_loss(alone)
    expected.backward()
    found = loss(trained, size)
    found.backward()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    places = {name: torch.arange(t.numel()).view(t.shape) for name, t in state.items()}
    kept = whole_places(family, cut(family, places, fields), places)
    gradients = {name: p.grad for name, p in alone.named_parameters()}
    for name, parameter in trained.weights.items():
        if parameter.requires_grad:
            whole = torch.zeros(parameter.numel())
            for place, grad in pieces(name, kept, gradients):
                whole[place] = grad
            given = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
            torch.testing.assert_close(
                given, whole.view(parameter.shape), atol=3e-5, rtol=1e-3, msg=name
            )


def whole_places(
    family: str, kept: dict[str, Tensor], places: dict[str, Tensor]
) -> dict[str, tuple[str, Tensor]]:
    """Child's tensor -> the parent's name, and the flat places kept of it."""
    from models import kept_layers
    from reference import _in_parent

    layers = kept_layers(family, SMALL[family]) if len(kept) < len(places) else []
    layers = layers or list(range(100))
    return {name: (_in_parent(name, layers), place.flatten()) for name, place in kept.items()}


def pieces(
    name: str, kept: dict[str, tuple[str, Tensor]], gradients: dict[str, Any]
) -> list[tuple[Tensor, Tensor]]:
    return [
        (place, gradients[child].flatten())
        for child, (parent, place) in kept.items()
        if parent == name and gradients.get(child) is not None
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_at_one_size_leave_the_rest_alone(family: str) -> None:
    trained = trainer(family, size_probs={"small": 1.0}, steps=3, weight_decay=0.0)
    before = weights(trained)
    trained.run()
    places = {name: torch.arange(t.numel()).view(t.shape) for name, t in before.items()}
    if family == "llama-tied":  # the stock state dict also names the head
        places["lm_head.weight"] = places["model.embed_tokens.weight"]
    inside = {name: torch.zeros(t.numel(), dtype=torch.bool) for name, t in before.items()}
    kept = whole_places(family, cut(family, places, SMALL[family]), places)
    for parent, place in kept.values():
        if parent in inside:
            inside[parent][place] = True
    for name, old in before.items():
        new = trained.weights[name].detach()
        assert torch.equal(new.flatten()[~inside[name]], old.flatten()[~inside[name]]), name
        if inside[name].any() and not trained.parts.layout.weights[name].is_buffer:
            assert not torch.equal(new, old), name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_of_the_teacher_itself_is_zero(family: str) -> None:
    trained = trainer(family, teach=True)
    assert loss(trained, "full").item() == pytest.approx(0, abs=1e-6)
    assert loss(trained, "small").item() > 0.01


def test_distillation_is_kl_to_the_teachers_logits() -> None:
    trained, batch = trainer("llama", teach=True), one_batch()
    model = elastic("llama")
    kinds = [stock.use_chunk_scan(m) for m in (model["small"], tiny("llama"))]
    with torch.no_grad():
        student, teacher = (
            m(**batch.inputs, use_cache=False).logits.double().log_softmax(-1) for m in kinds
        )
    kl = (teacher.exp() * (teacher - student)).sum(-1)[:, :-1][batch.targets[:, 1:]].mean()
    assert loss(trained, "small").item() == pytest.approx(kl.item(), rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_several_sizes_share_one_lesson(family: str) -> None:
    """Their gradient is the mean of each one's; the teacher runs once."""
    apart = trainer(family, teach=True)
    for size in SIZES:
        (loss(apart, size) / 3).backward()
    together = trainer(family, teach=True, sizes_per_batch=3, learning_rate=1e-12, clip=1e9)
    ran: list[int] = []
    assert together.teacher is not None
    together.teacher.skeleton({})[0].model.register_forward_hook(lambda *_: ran.append(1))
    together.optimizer.register_step_pre_hook(
        lambda *_: seen.update(
            {n: t.grad.clone() for n, t in together.weights.items() if t.grad is not None}
        )
    )
    seen: dict[str, Tensor] = {}
    report = together.step()
    assert len(ran) == 1 and report.sizes == dict.fromkeys(report.sizes, 1)
    assert set(report.sizes) == set(SIZES)
    for name, tensor in apart.weights.items():
        if tensor.grad is not None:
            torch.testing.assert_close(seen[name], tensor.grad, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("family", ["nemotron_h", "qwen3_moe"])
def test_blocks_computed_again_give_the_same_gradients(family: str) -> None:
    balance = Balance(rate=0.1, aux_loss=0.1)
    plain = trainer(family, teach=True, balance=balance)
    again = trainer(family, teach=True, balance=balance, checkpoint_activations=True)
    for each in (plain, again):
        each.run()
    same(weights(again), weights(plain))


@pytest.mark.parametrize("family", ["nemotron_h", "qwen3_moe", "llama-tied"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_size_learns(family: str, dtype: str) -> None:
    trained = trainer(family, steps=30, accumulate=2, dtype=dtype)
    before = {size: loss(trained, size).item() for size in SIZES}
    trained.run()
    after = {size: loss(trained, size).item() for size in SIZES}
    for size in SIZES:
        assert after[size] < 0.8 * before[size], size
    assert {tensor.dtype for tensor in trained.weights.values()} == {torch.float32}


def test_balancing_moves_the_bias_of_the_size_that_ran() -> None:
    balance = Balance(rate=0.5)
    trained = trainer("nemotron_h", balance=balance, steps=1, size_probs={"small": 1.0})
    before = weights(trained)
    trained.run()
    biases = [name for name in before if name.endswith("e_score_correction_bias")]
    moved = {n: trained.weights[n] - before[n] for n in biases}
    assert all(torch.equal(m[4:], torch.zeros(2)) for m in moved.values())  # small has 4 experts
    for bias in moved.values():
        steps = (2 * bias[:4].abs()).round(decimals=4).tolist()
        assert set(steps) <= {0.0, 1.0} and sum(steps) > 0


def test_without_a_rate_the_gate_bias_stays() -> None:
    trained = trainer("nemotron_h")
    before = weights(trained)
    trained.run()
    names = [name for name in before if name.endswith("e_score_correction_bias")]
    same({n: trained.weights[n] for n in names}, {n: before[n] for n in names})
    assert len(names) == 2


def test_a_trained_parent_is_whole_again() -> None:
    trained = trainer("nemotron_h", balance=Balance(rate=0.1))
    trained.run()
    assert not any(p.requires_grad or p.grad is not None for p in trained.parameters)
    skeletons = (trained.skeleton(fields)[0] for fields in trained.sizes.values())
    assert not any(m._forward_hooks for s in skeletons for m in s.modules())


def test_the_model_that_was_trained_is_the_one_in_memory() -> None:
    model = elastic("llama")
    before = logits(model["small"], one_batch().input_ids)
    trainer("llama", model=model).run()
    assert not torch.equal(logits(model["small"], one_batch().input_ids), before)


def diverged(trained: Trainer, message: str) -> str:
    """Run; the error is one line that matches."""
    with pytest.raises(DivergedError, match=message) as stop:
        trained.run()
    assert "\n" not in str(stop.value)
    return str(stop.value)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    """Only the size that sees it is named; its step changes nothing and the state is on disk."""
    changes: dict[str, Any] = dict(teach=True, accumulate=2, sizes_per_batch=3, steps=4)
    trained = trainer("nemotron_h", tmp_path, balance=Balance(rate=0.1), **changes)
    trained.step()
    with torch.no_grad():
        trained.weights["model.norm_f.weight"][-1] = torch.inf  # no smaller size has that channel
    before = weights(trained)
    said = diverged(trained, r"step 2 \(from micro-batch 2\): loss nan at size full, micro-batch 2")
    assert "full, micro-batch 3" in said and "small" not in said and "prefix" not in said
    same(weights(trained), before)
    again = trainer("nemotron_h", tmp_path, teach=True, steps=4)
    assert again.resume() and again.position.step == 1
    same(weights(again), before)


def test_a_learning_rate_that_blows_up_stops_the_run(tmp_path: Path) -> None:
    trained = trainer("llama", tmp_path, learning_rate=1e37, warmup_steps=0, save_every=1)
    diverged(trained, r"step 2 \(from micro-batch 1\): loss nan at size \w+, micro-batch 1")
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("clip", [1.0, 1e9])
def test_a_gradient_that_is_not_finite_stops_the_run(clip: float) -> None:
    trained = trainer("llama", size_probs={"small": 1.0}, clip=clip)
    before = weights(trained)
    trained.parameters[0].register_hook(lambda grad: grad * torch.inf)
    diverged(trained, r"step 1 \(from micro-batch 0\): gradient norm (nan|inf) after sizes small")
    same(weights(trained), before)


def test_a_gradient_of_the_router_that_is_not_finite_stops_the_run() -> None:
    trained = trainer("llama", teach=True)
    settings = Routing(axes={"hidden_size": [16, 24]}, every=1, width=8)
    router = Router(trained.parts.layout, settings, Metric(kind="active"), [1.0, 0.6])
    trained.routing = RouterTraining(router, trained.parts, {"full": 1.0, "small": 0.6})
    first = next(router.parameters())
    before = first.detach().clone()
    first.register_hook(lambda grad: grad * torch.nan)
    diverged(trained, r"step 1 .* gradient norm nan of the router")
    assert torch.equal(first, before)
