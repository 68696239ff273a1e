"""Sampling: transformers' own processors are the oracle, plain loops where it has none."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from star_elastic.serve.sampling import Sampling, choose, likeliest, penalized, warped

VOCAB = 40
PROMPT, ANSWER = [3, 5, 5, 9], [5, 11, 11, 11, 30]


def random_logits(seed: int) -> Tensor:
    return 3 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed))


def stock(sampling: Sampling) -> LogitsProcessorList:
    """What `generate` would run."""
    steps: list[Any] = []
    if sampling.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    steps.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        steps.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        steps.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        steps.append(MinPLogitsWarper(sampling.min_p))
    return LogitsProcessorList(steps)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.7),
        Sampling(temperature=1.0, top_k=5),
        Sampling(temperature=1.0, top_k=VOCAB + 1),
        Sampling(temperature=1.0, top_p=0.6),
        Sampling(temperature=1.0, top_p=1e-6),
        Sampling(temperature=1.0, top_p=1e-9),  # 1 - top_p is 1 in float32
        Sampling(temperature=1.0, min_p=0.1),
        Sampling(temperature=1.0, repetition_penalty=1.7),
        Sampling(temperature=1.3, top_k=12, top_p=0.8, min_p=0.05, repetition_penalty=0.8),
    ],
    ids=str,
)
def test_the_distribution_is_that_of_transformers(sampling: Sampling, seed: int) -> None:
    given = random_logits(seed)
    ids: Any = torch.tensor([[*PROMPT, *ANSWER]])
    processed: Any = stock(sampling)(ids, given.clone()[None])
    found = warped(penalized(given, sampling, PROMPT, ANSWER), sampling).softmax(-1)
    torch.testing.assert_close(found, processed[0].softmax(-1))
    assert torch.equal(found > 0, processed[0].softmax(-1) > 0)


def test_penalties_count_the_answer_only() -> None:
    given = random_logits(0)
    sampling = Sampling(presence_penalty=0.5, frequency_penalty=0.25, logit_bias={3: -4.0, 11: 2.0})
    expected = given.tolist()
    for token, bias in sampling.logit_bias.items():
        expected[token] += bias
    for token in set(ANSWER):
        expected[token] -= 0.5 + 0.25 * ANSWER.count(token)
    found = penalized(given, sampling, PROMPT, ANSWER)
    torch.testing.assert_close(found, torch.tensor(expected))
    assert torch.equal(given, random_logits(0))  # as it was
    torch.testing.assert_close(
        penalized(given, replace(sampling, logit_bias={}), PROMPT, []), given
    )


def test_greedy_takes_the_likeliest_after_penalties() -> None:
    given = random_logits(1)
    best = int(given.argmax())
    assert choose(given, Sampling(), PROMPT, [], None).token == best
    second = choose(given, Sampling(logit_bias={best: -100.0}), PROMPT, [], None).token
    assert second == int(given.topk(2).indices[1])


def test_draws_follow_the_distribution() -> None:
    """20,000 draws; every token's share within five standard errors."""
    given, count = random_logits(2), 20_000
    sampling = Sampling(temperature=1.5, top_k=6, seed=3)
    expected = warped(given, sampling).softmax(-1)
    generator = sampling.generator()
    drawn = [choose(given, sampling, PROMPT, [], generator).token for _ in range(count)]
    shares = torch.bincount(torch.tensor(drawn), minlength=VOCAB) / count
    error = (expected * (1 - expected) / count).sqrt()
    assert ((shares - expected).abs() <= 5 * error).all()


def test_a_seed_repeats_and_no_seed_does_not() -> None:
    given = torch.zeros(VOCAB)

    def draw(seed: int | None) -> list[int]:
        sampling = Sampling(temperature=1.0, seed=seed)
        generator = sampling.generator()
        return [choose(given, sampling, PROMPT, [], generator).token for _ in range(40)]

    assert draw(7) == draw(7) != draw(8)
    assert draw(None) != draw(None)
    assert Sampling(seed=7).generator() is None  # greedy


@pytest.mark.parametrize("temperature", [1e-300, 1e-9])
def test_hardly_any_temperature_is_greedy(temperature: float) -> None:
    given = random_logits(4)
    sampling = Sampling(temperature=temperature, top_p=0.9, min_p=0.1, seed=0)
    choice = choose(given, sampling, PROMPT, [], sampling.generator())
    assert choice.token == int(given.argmax())


def test_logprobs_are_the_models_own() -> None:
    given = random_logits(5)
    chosen = int(given.argmin())
    sampling = Sampling(logprobs=3, logit_bias={chosen: 100.0}, repetition_penalty=2.0)
    choice = choose(given, sampling, PROMPT, ANSWER, None)
    exact = [value - math.log(sum(map(math.exp, given.tolist()))) for value in given.tolist()]
    assert choice.token == chosen
    assert choice.logprob == pytest.approx(exact[chosen], abs=1e-5)
    best = sorted(range(VOCAB), key=lambda token: -exact[token])[:3]
    assert [token for token, _ in choice.top] == best
    assert [value for _, value in choice.top] == pytest.approx([exact[t] for t in best], abs=1e-5)
    assert choose(given, Sampling(logprobs=0), PROMPT, [], None).top == ()
    assert choose(given, Sampling(), PROMPT, [], None).logprob is None
    assert len(choose(given, Sampling(logprobs=VOCAB + 9), PROMPT, [], None).top) == VOCAB


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_an_error(value: float) -> None:
    given = random_logits(6)
    given[3] = value
    with pytest.raises(FloatingPointError, match="not finite"):
        choose(given, Sampling(), PROMPT, [], None)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.inf),
        ("presence_penalty", math.nan),
        ("frequency_penalty", math.inf),
        ("logit_bias", {3: math.nan}),
        ("seed", 2**63),
        ("logprobs", -1),
    ],
)
def test_values_out_of_range_are_refused(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        Sampling(**{field: value})


def test_the_likeliest_of_rows_that_are_numbers() -> None:
    rows = torch.stack([random_logits(seed) for seed in range(5)])
    expected: list[int | None] = rows.argmax(-1).tolist()
    for row, value in ((1, math.nan), (3, math.inf)):
        rows[row, 7], expected[row] = value, None
    assert likeliest(rows) == expected


@pytest.mark.parametrize(
    "bent",
    [
        {"temperature": 0.5},
        {"logprobs": 0},
        {"logit_bias": {3: 1.0}},
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.1},
        {"frequency_penalty": -0.1},
    ],
    ids=str,
)
def test_only_what_takes_the_likeliest_as_it_is_is_plain(bent: dict[str, Any]) -> None:
    assert Sampling(top_k=3, top_p=0.5, seed=1, logit_bias={2: 0.0}).is_plain
    assert not Sampling(**bent).is_plain
