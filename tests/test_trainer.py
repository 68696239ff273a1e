"""Joint training: the right gradients, the same run however often it is stopped (I8)."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import FAMILIES, SMALL, elastic, logits, same, standalone, tiny
from reference import cut
from torch import Tensor

from star_elastic.records import Batch, Example
from star_elastic.train.data import Batches
from star_elastic.train.distillation import balance_step, forward_kl, next_token_loss, predicting
from star_elastic.train.recipe import Optimise
from star_elastic.train.trainer import StepReport, Trainer, learning_rate

SIZES = ("full", "small", "prefix")


def examples(count: int = 24) -> list[Example]:
    """Rows that count upwards from somewhere, of unlike lengths."""
    return [
        Example([1 + (7 * row + place) % 40 for place in range(6 + row % 9)], 1 + row % 3)
        for row in range(count)
    ]


def batches() -> Batches:
    return Batches(examples(), tokens=40, pad=0, seed=5)


def optimise(**changes: Any) -> Optimise:
    values = dict(steps=6, tokens=40, warmup_steps=2, learning_rate=1e-2, save_every=1000)
    return Optimise(**{**values, **changes})


def trainer(
    family: str, folder: Path | None = None, teach: bool = False, **changes: Any
) -> Trainer:
    teacher = tiny(family) if teach else None
    return Trainer(elastic(family), teacher, batches(), optimise(**changes), folder)


def weights(trained: Trainer) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in trained.weights.items()}


class Interrupted(Batches):
    """A stream in which the user presses Ctrl-C before the n-th micro-batch."""

    def __init__(self, at: int):
        super().__init__(examples(), tokens=40, pad=0, seed=5)
        self.at = at

    def after(self, taken: int) -> Iterator[Batch]:
        for number, batch in enumerate(super().after(taken), taken):
            if number == self.at:
                raise KeyboardInterrupt
            yield batch


RESUMED: dict[str, Any] = dict(accumulate=2, balance_rate=0.05)


@pytest.mark.parametrize("teach", [False, True])
@pytest.mark.parametrize("family", ["nemotron_h", "qwen3_moe", "llama-tied"])
def test_stop_and_resume_is_never_stopped(family: str, teach: bool, tmp_path: Path) -> None:
    whole = trainer(family, teach=teach, **RESUMED)
    whole.run()
    for stop in range(1, 6):
        folder = tmp_path / str(stop)
        first = trainer(family, folder, teach, **RESUMED)

        def press(report: StepReport, stop: int = stop) -> None:
            if report.step == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            first.run(press)
        again = trainer(family, folder, teach, **RESUMED)
        assert again.resume() and again.position.step == stop
        again.run()
        same(weights(again), weights(whole))
        assert again.position.tokens == whole.position.tokens


@pytest.mark.parametrize("at", [1, 3, 4, 7])
def test_an_interrupt_inside_a_step_loses_that_step_only(at: int, tmp_path: Path) -> None:
    """Two micro-batches a step: 1, 3 and 7 are in the middle of one."""
    whole = trainer("nemotron_h", **RESUMED)
    whole.run()
    model = elastic("nemotron_h")
    first = Trainer(model, None, Interrupted(at), optimise(**RESUMED), tmp_path)
    with pytest.raises(KeyboardInterrupt):
        first.run()
    again = trainer("nemotron_h", tmp_path, **RESUMED)
    assert again.resume() and again.position.step == at // 2
    again.run()
    same(weights(again), weights(whole))


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_signal_around_the_update_loses_at_most_one_step(moment: str, tmp_path: Path) -> None:
    """A real SIGINT while the optimizer has half of the weights."""
    whole = trainer("nemotron_h", **RESUMED)
    whole.run()
    first = trainer("nemotron_h", tmp_path, **RESUMED)
    updates: list[int] = []

    def press(*_: Any) -> None:
        updates.append(1)
        if len(updates) == 3:
            signal.raise_signal(signal.SIGINT)

    hooks = {
        "before": first.optimizer.register_step_pre_hook,
        "after": first.optimizer.register_step_post_hook,
    }
    hooks[moment](press)
    with pytest.raises(KeyboardInterrupt):
        first.run()
    again = trainer("nemotron_h", tmp_path, **RESUMED)
    assert again.resume() and again.position.step in (2, 3)
    again.run()
    same(weights(again), weights(whole))


def test_saving_often_changes_nothing(tmp_path: Path) -> None:
    whole, saving = trainer("nemotron_h"), trainer("nemotron_h", tmp_path, save_every=1)
    whole.run()
    saving.run()
    same(weights(saving), weights(whole))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000006"]


def test_nothing_to_resume(tmp_path: Path) -> None:
    assert not trainer("llama", tmp_path).resume()
    assert not trainer("llama").resume()


def one_batch() -> Batch:
    return next(iter(batches()))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", SIZES)
def test_gradients_are_those_of_a_model_of_that_size(family: str, size: str) -> None:
    trained, batch = trainer(family), one_batch()
    fields = trained.model.sizes[size].config
    state = trained.model.parent.state_dict()
    alone = standalone(family, fields, cut(family, state, fields)).requires_grad_(True)
    labels = batch.input_ids.masked_fill(~batch.targets, -100)
    expected = alone(input_ids=batch.input_ids, labels=labels, use_cache=False).loss
    expected.backward()
    loss = trained.loss(batch, size)
    loss.backward()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    places = {name: torch.arange(t.numel()).view(t.shape) for name, t in state.items()}
    kept = cut(family, places, fields)
    for name, parameter in alone.named_parameters():
        whole = torch.zeros(state[name].numel())
        whole[kept[name].flatten()] = torch.zeros_like(parameter).flatten()
        if parameter.grad is not None:
            whole[kept[name].flatten()] = parameter.grad.flatten()
        found = trained.weights[name].grad
        found = torch.zeros(state[name].shape) if found is None else found
        torch.testing.assert_close(
            found, whole.view(state[name].shape), atol=2e-5, rtol=1e-3, msg=name
        )
        outside = torch.ones(state[name].numel(), dtype=torch.bool)
        outside[kept[name].flatten()] = False
        assert not found.flatten()[outside].any(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_at_one_size_leave_the_rest_alone(family: str) -> None:
    trained = trainer(family, size_probs={"small": 1.0}, steps=3, weight_decay=0.0)
    before = weights(trained)
    trained.run()
    places = {name: torch.arange(t.numel()).view(t.shape) for name, t in before.items()}
    moved = set()
    for name, place in cut(family, tied(family, places), SMALL[family]).items():
        if name not in before:
            continue
        outside = torch.ones(before[name].numel(), dtype=torch.bool)
        outside[place.flatten()] = False
        old, new = before[name].flatten(), trained.weights[name].detach().flatten()
        assert torch.equal(new[outside], old[outside]), name
        if not torch.equal(new, old):
            moved.add(name)
    learned = {name for name, w in trained.model.layout.weights.items() if not w.is_buffer}
    assert moved == learned


def tied(family: str, places: dict[str, Tensor]) -> dict[str, Tensor]:
    """The stock state dict also names the head of tied embeddings."""
    if family != "llama-tied":
        return places
    return places | {"lm_head.weight": places["model.embed_tokens.weight"]}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_of_the_teacher_itself_is_zero(family: str) -> None:
    trained = trainer(family, teach=True)
    assert trained.loss(one_batch(), "full").item() == pytest.approx(0, abs=1e-6)
    assert trained.loss(one_batch(), "small").item() > 0.01


def test_distillation_is_kl_to_the_teachers_logits() -> None:
    trained, batch = trainer("nemotron_h", teach=True), one_batch()
    student = logits(trained.model["small"], batch.input_ids).double().log_softmax(-1)
    teacher = logits(tiny("nemotron_h"), batch.input_ids).double().log_softmax(-1)
    kl = (teacher.exp() * (teacher - student)).sum(-1)[:, :-1][batch.targets[:, 1:]].mean()
    assert trained.loss(batch, "small").item() == pytest.approx(kl.item(), rel=1e-4)


def test_forward_kl_by_hand() -> None:
    student = torch.tensor([[0.0, 0.0], [1.0, 3.0]])
    teacher = torch.tensor([[0.0, 0.0], [2.0, 2.0]])
    q = torch.tensor([1.0, 3.0]).softmax(-1)
    expected = (0.5 * torch.log(0.5 / q)).sum() / 2  # the first position adds nothing
    assert forward_kl(student, teacher).item() == pytest.approx(expected.item(), rel=1e-5)


def test_next_token_loss_is_the_stock_loss() -> None:
    model, batch = tiny("llama"), one_batch()
    labels = batch.input_ids.masked_fill(~batch.targets, -100)
    with torch.no_grad():
        output = model(input_ids=batch.input_ids, labels=labels, use_cache=False)
    found = next_token_loss(output.logits, batch.input_ids, batch.targets)
    torch.testing.assert_close(found, output.loss)


def test_targets_are_predicted_by_the_position_before() -> None:
    said = torch.arange(8.0).view(1, 4, 2)
    targets = torch.tensor([[False, False, True, True]])
    assert predicting(said, targets).tolist() == [[2.0, 3.0], [4.0, 5.0]]


def test_padding_does_not_change_the_loss() -> None:
    trained = trainer("nemotron_h")
    batch = one_batch()
    wider = Batch(*(torch.nn.functional.pad(t, (0, 5)) for t in vars(batch).values()))
    found, expected = (trained.loss(each, "small").item() for each in (wider, batch))
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("family", ["nemotron_h", "qwen3_moe", "llama-tied"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_size_learns(family: str, dtype: str) -> None:
    trained = trainer(family, steps=30, accumulate=2, dtype=dtype)
    before = measured(trained)
    trained.run()
    after = measured(trained)
    for size in SIZES:
        assert after[size] < 0.8 * before[size], size
    assert {tensor.dtype for tensor in trained.weights.values()} == {torch.float32}


@torch.no_grad()
def measured(trained: Trainer) -> dict[str, float]:
    stream = [batch for batch, _ in zip(batches(), range(6), strict=False)]
    return {size: sum(trained.loss(batch, size).item() for batch in stream) for size in SIZES}


def test_reports_say_what_was_done() -> None:
    trained, reports = trainer("llama", accumulate=3), []
    trained.run(reports.append)
    assert [report.step for report in reports] == [1, 2, 3, 4, 5, 6]
    stream = iter(batches())
    tokens = 0
    for report in reports:
        drawn = [trained.drawn(3 * (report.step - 1) + n) for n in range(3)]
        assert report.sizes == {size: drawn.count(size) for size in drawn}
        assert report.losses.keys() == set(drawn)
        tokens += sum(next(stream).tokens for _ in range(3))
        assert report.tokens == tokens
        rate = learning_rate(trained.settings, report.step - 1)
        assert report.learning_rate == rate


def test_sizes_are_drawn_as_their_probabilities_say() -> None:
    trained = trainer("llama", size_probs={"full": 1.0, "small": 3.0})
    drawn = [trained.drawn(n) for n in range(4000)]
    assert 0.22 < drawn.count("full") / 4000 < 0.28
    assert drawn.count("prefix") == 0
    assert drawn == [trained.drawn(n) for n in range(4000)]


def test_learning_rate() -> None:
    settings = optimise(steps=102, warmup_steps=2, learning_rate=1.0, min_lr_ratio=0.1)
    rates = [learning_rate(settings, step) for step in range(103)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[52] == pytest.approx(0.55)
    assert rates[102] == pytest.approx(0.1)
    assert all(later < earlier for earlier, later in zip(rates[2:], rates[3:], strict=False))


def test_balance_raises_the_idle_and_lowers_the_busy() -> None:
    bias = torch.zeros(4)
    balance_step(bias, torch.tensor([4.0, 2.0, 2.0, 0.0]), rate=0.5)
    assert bias.tolist() == [-0.5, 0.0, 0.0, 0.5]


def test_balancing_counts_real_tokens_of_the_size_that_ran() -> None:
    trained = trainer("nemotron_h", balance_rate=0.5, steps=1, size_probs={"small": 1.0})
    batch, small = one_batch(), trained.model["small"]
    chosen: dict[str, Tensor] = {}
    for name, module in small.named_modules():
        if name.endswith(".gate"):
            module.register_forward_hook(
                lambda _, __, output, name=name: chosen.update({name: output[2]})
            )
    logits(small, batch.input_ids)
    before = weights(trained)
    trained.run()
    for name, picks in chosen.items():
        load = torch.bincount(picks[batch.mask.flatten()].flatten(), minlength=4).float()
        expected = before[f"{name}.e_score_correction_bias"].clone()
        expected[:4] += 0.5 * torch.sign(load.mean() - load)
        assert torch.equal(trained.weights[f"{name}.e_score_correction_bias"], expected)
    assert len(chosen) == 2


def test_without_a_rate_the_gate_bias_stays() -> None:
    trained = trainer("nemotron_h")
    before = weights(trained)
    trained.run()
    names = [name for name in before if name.endswith("e_score_correction_bias")]
    same({n: trained.weights[n] for n in names}, {n: before[n] for n in names})
    assert len(names) == 2


def test_a_trained_parent_is_whole_again() -> None:
    trained = trainer("nemotron_h")
    trained.run()
    assert not any(p.requires_grad or p.grad is not None for p in trained.parameters)
    assert not any(m._forward_hooks for s in trained.skeletons.values() for m in s.modules())
