"""The model of difficulty: what it reads, what it learns from known odds, how it is judged."""

import math
from dataclasses import replace
from itertools import combinations_with_replacement

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from star_elastic.serve.difficulty import NAMES, NEVER, PROBE, PROMPT, features, probe_of
from star_elastic.serve.difficulty.curve import auc, calibration_error, measure, mixed
from star_elastic.serve.difficulty.fitting import fit, split, verdict
from star_elastic.serve.difficulty.logistic import fit_logistic
from star_elastic.serve.difficulty.outcomes import Outcomes
from star_elastic.serve.difficulty.thresholds import choose, cuts, thresholds
from star_elastic.serve.engine import Event

SIZES, PRICES = ("small", "middle", "full"), (0.3, 0.6, 1.0)


def odds(digits: np.ndarray) -> np.ndarray:
    """Of a good answer at each size: longer numbers are harder, for the small one sooner."""
    return 1 / (1 + np.exp(digits[:, None] - np.array([4.0, 7.0, 10.0])))


def known(count: int, seed: int = 0, told: bool = True) -> Outcomes:
    """Outcomes drawn by `odds` of prompts that tell them, or that all look alike."""
    draw = np.random.default_rng(seed)
    digits = draw.integers(1, 12, count)
    texts = [f"what is {'7' * (n if told else 5)}?" for n in digits]
    probes = [[[-0.1, -3.0]] * 4 for _ in texts]
    good = (draw.random((count, 3)) < odds(digits)).astype(float)
    lengths = [len(text) for text in texts]
    return Outcomes(SIZES, PRICES, texts, lengths, probes, good, np.full((count, 3), 20.0))


# features


def test_a_prompt_in_numbers() -> None:
    found = features("What is 12+345?\nNow!", 9)
    assert found.keys() == set(PROMPT)
    assert found["digits"] == 5 / 20 and found["longest_number"] == 3
    assert found["log_numbers"] == math.log1p(2) and found["log_lines"] == math.log1p(1)
    assert found["operators"] == 1 / 20 and found["log_tokens"] == math.log1p(9)


def test_a_probe_in_numbers() -> None:
    sure, torn = [math.log(0.9), math.log(0.1)], [math.log(0.5), math.log(0.5)]
    found = features("x", 1, [sure, torn])
    assert found.keys() == set(NAMES)
    assert found["first_logprob"] == math.log(0.9) and found["least_logprob"] == math.log(0.5)
    assert found["most_entropy"] == pytest.approx(math.log(2))
    assert found["mean_margin"] == pytest.approx(0.4) and found["unsure_tokens"] == 0.5


def test_what_is_not_among_the_likeliest_is_unsure_too() -> None:
    half = features("x", 1, [[math.log(0.5)]])
    assert half["mean_entropy"] == pytest.approx(math.log(2))


@given(
    st.text(max_size=300),
    st.integers(0, 10**6),
    st.lists(st.lists(st.floats(-math.inf, 0.0), max_size=20), max_size=8),
)
@settings(max_examples=200, deadline=None)
def test_features_are_finite_whatever_comes(
    text: str, tokens: int, probe: list[list[float]]
) -> None:
    found = features(text, tokens, probe)
    assert all(map(math.isfinite, found.values()))
    assert found.keys() == set(NAMES if probe else PROMPT)


def test_the_middle_of_a_long_prompt_is_not_read() -> None:
    """Ten million characters take no longer than eight thousand."""
    ends = "1" * 4096, "é" * 4096
    found = features(f"{ends[0]}{'x' * 10**7}{ends[1]}", 10)
    assert found["digits"] == found["not_ascii"] == 0.5
    assert found["log_characters"] == math.log1p(10**7 + 8_192)


def test_the_probe_out_of_events() -> None:
    events = [Event(1, 5, -0.1, ((5, -0.1), (6, -2.5))), Event(1, 7, -0.2, ((7, -0.2),), "stop")]
    assert probe_of([*events, Event(1, finish="length")], 8) == [[-0.1, -2.5], [-0.2]]
    assert probe_of(events, 1) == [[-0.1, -2.5]]


# regression


def test_weights_are_found_and_chances_are_true() -> None:
    draw = np.random.default_rng(0)
    x_nf = draw.normal(5.0, 3.0, (20_000, 3))
    true = 1 / (1 + np.exp(-(x_nf[:, 0] - 5.0 - 0.5 * (x_nf[:, 1] - 5.0))))
    y_n1 = (draw.random(len(true)) < true).astype(float)[:, None]
    model = fit_logistic(x_nf, y_n1, l2=1e-6)
    assert (model.weights[:, 0] / model.scale).tolist() == pytest.approx([1, -0.5, 0], abs=0.04)
    chances = model.probabilities(x_nf)[:, 0]
    assert chances.mean() == pytest.approx(y_n1.mean(), abs=1e-3)
    assert calibration_error(chances, y_n1[:, 0]) < 0.01
    assert np.abs(chances - true).max() < 0.07


def test_constant_features_and_certain_outcomes_do_no_harm() -> None:
    model = fit_logistic(np.ones((50, 2)), np.ones((50, 1)), l2=1e-3)
    assert np.isfinite(model.weights).all()
    assert model.probabilities(np.array([[1.0, 1.0], [9.0, 9.0]])) == pytest.approx(1, abs=0.01)


# thresholds


@given(st.integers(0, 10**6), st.floats(0.01, 3.0))
@settings(max_examples=60, deadline=None)
def test_no_other_cuts_are_better(seed: int, price: float) -> None:
    draw = np.random.default_rng(seed)
    chances, cost = draw.random((7, 3)), draw.random((7, 3))
    value = chances - price * cost

    def worth(first: int, second: int) -> float:
        parts = (value[:first, 0], value[first:second, 1], value[second:, 2])
        return sum(float(part.sum()) for part in parts)

    best = max(worth(*pair) for pair in combinations_with_replacement(range(8), 2))
    assert worth(*cuts(chances, cost, price).tolist()) == pytest.approx(best)


@given(st.integers(0, 10**6), st.floats(0.05, 1.0), st.integers(2, 4))
@settings(max_examples=60, deadline=None)
def test_costs_stay_within_the_share(seed: int, share: float, sizes: int) -> None:
    draw = np.random.default_rng(seed)
    chances = np.sort(draw.random((60, sizes)), 1)
    cost = np.linspace(0.2, 1.0, sizes) * draw.uniform(0.9, 1.1, (60, 1))
    found = thresholds(chances, cost, share)
    assert found == sorted(found) and all(-NEVER <= each <= NEVER for each in found)
    chosen = choose(chances[:, -1] - chances[:, 0], found)
    spent = cost[np.arange(60), chosen].mean()
    assert spent <= share or not chosen.any()


def test_a_share_is_used_up() -> None:
    chances = np.stack([np.zeros(1000), np.linspace(0, 1, 1000)], 1)
    cost = np.tile([0.4, 1.0], (1000, 1))
    for share in (0.5, 0.7, 0.95):
        least = thresholds(chances, cost, share)
        assert cost[np.arange(1000), choose(chances[:, 1], least)].mean() > share - 0.002
    assert thresholds(chances, cost, 0.3) == [NEVER]


def test_a_larger_size_that_is_worse_is_not_paid_for() -> None:
    chances = np.tile([0.5, 0.4], (10, 1))
    assert thresholds(chances, np.tile([0.4, 1.0], (10, 1)), 1.0) == [NEVER]


# measuring


def test_random_mixing_is_the_best_mixing() -> None:
    accuracy = np.array([[0.5, 0.55, 0.9]])
    cost = np.array([[0.2, 0.6, 1.0]])  # the middle size is below the line between the others
    for at, best in [(0.2, 0.5), (0.6, 0.7), (1.0, 0.9), (1.4, 0.9), (0.1, 0.5)]:
        assert mixed(accuracy, cost, np.array([at]))[0] == pytest.approx(best)


def test_who_mixes_at_random_does_not_beat_random_mixing() -> None:
    """In 19 of 20 cases at least: that is what the interval promises."""
    outcomes, inside = known(400), 0
    for seed in range(40):
        coins = np.random.default_rng(seed).random(400) < 0.5
        point = measure(outcomes, [np.where(coins, 2, 0)], [0], seed)[0]
        inside += point.difference.low <= 0 <= point.difference.high
    assert inside >= 34


def test_a_probe_is_paid_for_where_another_size_answers() -> None:
    outcomes = replace(known(3), prompt_tokens=[10, 10, 10], tokens_ns=np.full((3, 3), 10.0))
    plain, probed = outcomes.costs(), outcomes.costs(4)
    assert plain[0].tolist() == pytest.approx([0.3, 0.6, 1.0])
    assert (probed - plain)[0].tolist() == pytest.approx([0, 0.3 * 14 / 20, 0.3 * 14 / 20])
    short = replace(outcomes, tokens_ns=np.full((3, 3), 2.0))
    assert (short.costs(4) - short.costs())[0, 2] == pytest.approx(0.3)  # it ended before


def test_auc() -> None:
    gained = np.array([False, False, True, True] * 20)
    scores = np.array([1.0, 2.0, 2.0, 3.0] * 20)
    assert auc(scores, gained).mean == pytest.approx(0.875)
    assert auc(np.zeros(80), gained).mean == 0.5 and auc(scores, gained & False).mean == 0.5


# all of it


def test_known_difficulty_is_recovered() -> None:
    outcomes = known(2000)
    found = fit(outcomes, [0, 4])
    assert found.sizes == list(SIZES) and [r.probe_tokens for r in found.routers] == [0, 4]
    for digits in (2, 5, 8):
        text = f"what is {'7' * digits}?"
        true = odds(np.array([digits]))[0]
        assert found.of(text, len(text)) == pytest.approx(true[2] - true[0], abs=0.12)
    assert found.provenance.auc["0"].low > 0.6
    assert found.provenance.calibration_error["0"] < 0.08
    middle = found.table[4]
    assert middle.difference.low > 0.02 and abs(middle.cost_share - middle.share) < 0.05
    assert all(setting.probe_tokens == 0 for setting in found.table)  # this probe tells nothing
    assert found == fit(outcomes, [0, 4])


def test_a_probe_that_tells_is_used() -> None:
    blind = known(2000, told=False)
    digits = np.random.default_rng(0).integers(1, 12, 2000)
    probes = [[[-0.02 * n, -4.0 + 0.3 * n]] for n in digits]
    found = fit(replace(blind, probes=probes), [0, 1])
    assert found.provenance.auc["0"].mean == 0.5 and found.provenance.auc["1"].low > 0.6
    assert found.table[2].probe_tokens == 1 and found.table[2].difference.low > 0


def test_what_cannot_be_told_is_not_claimed() -> None:
    found = fit(known(600, told=False), [0])
    assert all(setting.difference.low <= 0 for setting in found.table)
    assert verdict(found).startswith("NOT shown to beat random mixing")


def test_the_held_out_requests_are_none_of_the_fitted() -> None:
    outcomes = replace(known(200), prompt_tokens=list(range(200)))
    fitting, measuring = split(outcomes, 0.3, seed=1)
    both = [*fitting.prompt_tokens, *measuring.prompt_tokens]
    assert len(measuring) == 60 and sorted(both) == list(range(200))


def test_too_little_to_learn_from_is_refused() -> None:
    with pytest.raises(ValueError, match="99 graded requests; it takes 100"):
        fit(known(99), [0])
    always = known(200)
    always.quality_ns[:] = 1.0
    with pytest.raises(ValueError, match="0 of 200 answers of full are better than those of small"):
        fit(always, [0])
    always.quality_ns[:, 0] = 0.0
    with pytest.raises(ValueError, match="0 of 200 answers of full are not better"):
        fit(always, [0])
    rambling = known(200)
    rambling.tokens_ns[:, 0] = 500.0
    with pytest.raises(ValueError, match="small costs .* times what full costs"):
        fit(rambling, [0])


def test_features_of_the_probe_are_the_last() -> None:
    assert NAMES == PROMPT + PROBE and len(set(NAMES)) == len(NAMES)
