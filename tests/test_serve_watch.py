"""Tokens that are forced upon an answer, at its beginning or by whoever watches it."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from models import VOCAB, elastic, logits
from test_serve_engine import alone, answers, drain, ends, prompt

from star_elastic.serve.engine import Engine, Request
from star_elastic.serve.sampling import Sampling


@pytest.mark.parametrize("family", ["nemotron_h", "llama"])
def test_an_answer_begins_with_what_is_forced(family: str) -> None:
    """And goes on as if the model had said it itself; alone, or beside others."""
    model = elastic(family)
    engine = Engine(model, 3, max_length=48, step_tokens=7, sizes=["full"])
    ids, forced = prompt(9, 1), [5, 60, 5]
    other = engine.submit(Request(prompt(4, 2), "full", 9))
    id = engine.submit(Request(ids, "full", 8, forced=forced))
    events = drain(engine)
    assert answers(events)[id] == forced + alone(model, "full", ids + forced, 5)
    assert answers(events)[other] == alone(model, "full", prompt(4, 2), 9)
    assert ends(events) == {id: "length", other: "length"}


def test_no_more_is_forced_than_was_asked_for() -> None:
    engine = Engine(elastic("llama"), 1, max_length=32)
    ids = prompt(5, 0)
    cut = engine.submit(Request(ids, "full", 2, forced=[7, 8, 9]))
    stops = Sampling(stop_ids=frozenset({8}))
    ended = engine.submit(Request(ids, "full", 9, stops, forced=[7, 8, 9]))
    events = drain(engine)
    assert answers(events) == {cut: [7, 8], ended: [7, 8]}
    assert ends(events) == {cut: "length", ended: "stop"}


@pytest.mark.parametrize("cache_tokens", [200, 50])  # the fewer make them give way
def test_who_watches_hears_every_token_once_and_in_order(cache_tokens: int) -> None:
    model = elastic("llama")
    engine = Engine(model, 3, 48, cache_tokens, step_tokens=11, block_size=4, sizes=["full"])
    heard: dict[int, list[int]] = {0: [], 1: [], 2: []}

    def watch(number: int) -> Any:
        def after(token: int) -> Sequence[int]:
            heard[number].append(token)
            return [50 + number, 40] if len(heard[number]) == 12 else ()

        return after

    ids = [prompt(9 + number, number) for number in heard]
    requests = [Request(ids[n], "full", 24, watch=watch(n), forced=[3]) for n in heard]
    submitted = [engine.submit(request) for request in requests]
    events = drain(engine)
    assert (engine.scheduler.preemptions > 0) == (cache_tokens == 50)
    assert [answers(events)[id] for id in submitted] == list(heard.values())
    for number, said in heard.items():
        begun = [3, *alone(model, "full", [*ids[number], 3], 11), 50 + number, 40]
        assert said == begun + alone(model, "full", ids[number] + begun, 10)


def test_what_is_forced_is_appended_to_what_still_is() -> None:
    engine = Engine(elastic("qwen2"), 1, max_length=32)
    follows = {5: [7], 6: [8]}
    asked = Request(prompt(4, 0), "full", 6, forced=[5, 6], watch=lambda t: follows.get(t, ()))
    id = engine.submit(asked)
    assert answers(drain(engine))[id][:4] == [5, 6, 7, 8]


@pytest.mark.parametrize("asked", [None, 0, 2])
def test_forced_tokens_have_the_models_own_logprobs(asked: int | None) -> None:
    """Nothing is drawn for them: what follows is drawn as if they had been in the prompt."""
    model = elastic("llama")
    sampling = Sampling(temperature=1.5, seed=4, logprobs=asked)
    engine = Engine(model, 1, max_length=32)
    ids, forced = prompt(6, 0), [9, 11]
    engine.submit(Request(ids, "full", 7, sampling, forced=forced))
    events = drain(engine)
    said = logits(model["full"], torch.tensor([[*ids, *forced]]))[0].log_softmax(-1)
    for place, (token, event) in enumerate(zip(forced, events, strict=False), 5):
        assert event.token == token and len(event.top) == (asked or 0)
        expected = None if asked is None else pytest.approx(float(said[place, token]), abs=1e-4)
        assert event.logprob == expected
    later = [event.token for event in events[2:]]
    assert engine.generate([ids + forced], "full", 5, sampling) == [later]


def test_a_watch_that_raises_fails_its_request_alone() -> None:
    model = elastic("nemotron_h")
    engine = Engine(model, 4, max_length=32, sizes=["full"])

    def refuse(token: int) -> Sequence[int]:
        raise RuntimeError("enough")

    good = engine.submit(Request(prompt(5, 1), "full", 6))
    raising = engine.submit(Request(prompt(5, 2), "full", 6, watch=refuse))
    wild = engine.submit(Request(prompt(5, 3), "full", 6, watch=lambda _: [VOCAB]))
    events = drain(engine)
    errors = {event.id: event.error for event in events if event.error}
    assert errors == {
        raising: "RuntimeError: enough",
        wild: "ValueError: token 64: the vocabulary has 64",
    }
    assert answers(events) == {good: alone(model, "full", prompt(5, 1), 6)}
    with pytest.raises(ValueError, match="token 64"):
        engine.submit(Request([1], "full", forced=[VOCAB]))
