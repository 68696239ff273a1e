"""What a step draws: stages, sizes, learning rates; and that its report says so."""

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from models import same
from training import SIZES, Listener, optimise, stream, trainer, weights

from star_elastic.train import curriculum
from star_elastic.train.recipe import Stage

STAGES = [
    Stage(steps=2, sequence_length=24, rows=2, learning_rate=1e-2, warmup_steps=1),
    Stage(
        steps=3,
        sequence_length=40,
        rows=1,
        accumulate=2,
        learning_rate=1e-3,
        size_probs={"small": 1.0},
    ),
]


def test_reports_say_what_was_done() -> None:
    trained, listener = trainer("llama", accumulate=3), Listener()
    trained.callbacks = [listener]
    trained.run()
    assert [report.step for report in listener.reports] == [1, 2, 3, 4, 5, 6]
    tokens, batches = 0, stream()
    stage = trained.settings.stages[0]
    for report in listener.reports:
        first = 3 * (report.step - 1)
        drawn = [
            name
            for n in range(first, first + 3)
            for name in curriculum.drawn(trained.settings, stage, trained.sizes, (), n)
        ]
        assert report.sizes == {size: drawn.count(size) for size in drawn}
        assert report.losses.keys() == set(drawn)
        tokens += sum(next(batches).tokens for _ in range(3))
        assert report.tokens == tokens
        assert report.learning_rate == curriculum.learning_rate(stage, report.step - 1)


def test_stages_follow_one_another() -> None:
    trained, listener = trainer("llama", stages=STAGES), Listener()
    trained.callbacks = [listener]
    asked: list[int] = []
    whole = trained.streams
    trained.streams = lambda number: asked.append(number) or whole(number)
    trained.run()
    reports = listener.reports
    assert [report.stage for report in reports] == [0, 0, 1, 1, 1]
    assert asked == [0, 1]
    assert {size for report in reports[2:] for size in report.sizes} == {"small"}
    assert [sum(report.sizes.values()) for report in reports] == [1, 1, 2, 2, 2]
    assert reports[2].learning_rate < 1e-3 / 40  # a warm-up of its own
    batches = [*islice(stream(0, 2, 24), 2), *islice(stream(1, 1, 40), 6)]
    assert [batch.input_ids.shape for batch in batches] == [(2, 24)] * 2 + [(1, 40)] * 6
    ends = [sum(batch.tokens for batch in batches[:n]) for n in (1, 2, 4, 6, 8)]
    assert [report.tokens for report in reports] == ends


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_a_resume_finds_its_place_in_a_stage(stop: int, tmp_path: Path) -> None:
    """In the middle of a stage (1, 3, 4) and at a border (2)."""
    whole, listener = trainer("llama", stages=STAGES), Listener()
    whole.callbacks = [listener]
    whole.run()
    first = trainer("llama", tmp_path, stages=STAGES)
    for _ in range(stop):
        first.step()
    first.save(wait=True)
    again, after = trainer("llama", tmp_path, stages=STAGES), Listener()
    assert again.resume() and again.position.step == stop
    again.callbacks = [after]
    again.run()
    same(weights(again), weights(whole))
    assert again.position.data == whole.position.data
    expected = listener.reports[stop:]
    assert [report.losses for report in after.reports] == [report.losses for report in expected]
    assert [report.tokens for report in after.reports] == [report.tokens for report in expected]


def test_between_sizes_are_drawn_and_learned() -> None:
    trained, listener = trainer("llama", steps=12, between=0.5, rungs=3), Listener()
    trained.callbacks = [listener]
    trained.run()
    drawn = [size for report in listener.reports for size in report.sizes]
    assert 0 < drawn.count(curriculum.BETWEEN) < 12


def test_sizes_are_drawn_as_their_probabilities_say() -> None:
    settings = optimise(size_probs={"full": 1.0, "small": 3.0})
    sizes: dict[str, Any] = dict.fromkeys(SIZES, {})
    draws = [curriculum.drawn(settings, settings.stages[0], sizes, (), n) for n in range(4000)]
    names = [next(iter(draw)) for draw in draws]
    assert 0.22 < names.count("full") / 4000 < 0.28
    assert names.count("prefix") == 0


def test_several_sizes_of_a_draw_are_distinct() -> None:
    settings = optimise(sizes_per_batch=2, size_probs={"full": 1.0, "small": 3.0, "prefix": 0.0})
    sizes: dict[str, Any] = dict.fromkeys(SIZES, {})
    draws = [curriculum.drawn(settings, settings.stages[0], sizes, (), n) for n in range(50)]
    assert all(set(draw) == {"full", "small"} for draw in draws)
    assert len({tuple(draw) for draw in draws}) == 2  # in either order


def test_draws_are_shared_by_as_many_as_asked() -> None:
    settings = optimise(same_size=4, accumulate=4, steps=20)
    sizes: dict[str, Any] = dict.fromkeys(SIZES, {})
    draws = [[*curriculum.drawn(settings, settings.stages[0], sizes, (), n)] for n in range(400)]
    groups = [draws[n : n + 4] for n in range(0, 400, 4)]
    assert all(draw == group[0] for group in groups for draw in group)
    assert {draw[0] for draw in draws} == set(SIZES)
    trained, listener = trainer("llama", same_size=4, accumulate=4), Listener()
    trained.callbacks = [listener]
    trained.run()
    assert all(list(report.sizes.values()) == [4] for report in listener.reports)


def test_learning_rate() -> None:
    stage = Stage(steps=102, warmup_steps=2, learning_rate=1.0, min_lr_ratio=0.1)
    rates = [curriculum.learning_rate(stage, step) for step in range(103)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[52] == pytest.approx(0.55)
    assert rates[102] == pytest.approx(0.1)
    assert all(later < earlier for earlier, later in zip(rates[2:], rates[3:], strict=False))


def test_processes_divide_what_they_share() -> None:
    settings = optimise(same_size=2, accumulate=6)
    curriculum.check_processes(settings, 2)
    with pytest.raises(ValueError, match=r"train\.same_size = 2: with 3 processes") as refused:
        curriculum.check_processes(settings, 3)
    assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match=r"train\.stages\.0\.accumulate = 6: with 4 processes"):
        curriculum.check_processes(optimise(same_size=4, accumulate=6), 4)
