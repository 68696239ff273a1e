"""The engine: whatever happens around it, a sequence gets the tokens that it gets alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from models import FAMILIES, VOCAB, elastic, logits, token_ids
from test_quantize import parent_of, quantized

from star_elastic.model import ElasticModel
from star_elastic.serve.engine import Engine, Event, Request
from star_elastic.serve.sampling import Sampling, choose

SIZES = ["full", "small", "prefix"]


def prompt(length: int, seed: int) -> list[int]:
    return token_ids(1, length, seed)[0].tolist()


def alone(model: ElasticModel, size: str, ids: Sequence[int], count: int) -> list[int]:
    """What stock `generate` answers, greedily."""
    view: Any = model[size]
    whole = view.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False)
    return whole[0, len(ids) :].tolist()


def drain(engine: Engine) -> list[Event]:
    events: list[Event] = []
    while engine.busy:
        events += engine.step()
    return events


def answers(events: Sequence[Event]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for event in events:
        if event.token is not None:
            found.setdefault(event.id, []).append(event.token)
    return found


def ends(events: Sequence[Event]) -> dict[int, str]:
    """How each request ended; none ends twice."""
    pairs = [(event.id, event.finish) for event in events if event.finish is not None]
    found = dict(pairs)
    assert len(found) == len(pairs)
    return found


def pool_tensors(engine: Engine) -> list[torch.Tensor]:
    return [tensor for room in engine._pools.rooms.values() for tensor in room.pool.tensors]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_crowd_gets_what_each_gets_alone(family: str) -> None:
    """All sizes, unlike lengths, odd chunks, preemption, cancelled neighbours, used slots."""
    model = elastic(family)
    engine = Engine(model, 2, max_length=48, cache_tokens=50, step_tokens=11, block_size=5)
    events: list[Event] = []
    wanted, cancelled = {}, []
    for number, length in enumerate([1, 7, 23, 2, 13, 30, 5, 9, 17, 3, 11, 26]):
        size, count = SIZES[number % 3], 6 + number
        ids = prompt(length, number)
        request = Request(ids, size, count, priority=-(number // 9))  # the last three take slots
        wanted[engine.submit(request)] = (size, ids, count)
        if number % 3 == 1:
            cancelled.append(engine.submit(Request(prompt(19, 90 + number), size, 12)))
        if number % 3 == 2:
            for _ in range(number // 2):
                events += engine.step()
            assert engine.cancel(cancelled[-1]) or cancelled[-1] in ends(events)
    events += drain(engine)
    found = answers(events)
    expected = {id: alone(model, *request) for id, request in wanted.items()}
    assert {id: found[id] for id in wanted} == expected
    assert {ends(events)[id] for id in wanted} == {"length"}
    assert "cancelled" in {ends(events)[id] for id in cancelled}
    assert engine.scheduler.preemptions > 0
    assert len({token for answer in expected.values() for token in answer}) > 10


@pytest.mark.parametrize("step_tokens", [2, 3, 4, 5, 7, 8, 11, 64])
@pytest.mark.parametrize("family", ["nemotron_h", "qwen3_moe"])
def test_prompts_may_be_cut_anywhere(family: str, step_tokens: int) -> None:
    """Chunks shorter than the convolution, at and beside the borders of scan and blocks."""
    model = elastic(family)
    engine = Engine(model, 1, max_length=40, step_tokens=step_tokens, block_size=4, sizes=["full"])
    for length in (1, 8, 9, 21):
        ids = prompt(length, length)
        assert engine.generate([ids], "full", 6) == [alone(model, "full", ids, 6)]


@pytest.mark.parametrize("family", ["nemotron_h", "llama"])
def test_nothing_of_a_former_sequence_is_seen(family: str) -> None:
    """Not even when all that it left is NaN."""
    model = elastic(family)
    engine = Engine(model, 2, max_length=32, block_size=4, reuse=False)
    ids = [prompt(9, 1), prompt(4, 2), prompt(6, 3)]
    first = engine.generate(ids, "small", 8)
    for tensor in pool_tensors(engine):
        tensor.fill_(torch.nan)
    assert engine.generate(ids, "small", 8) == first
    assert first == [alone(model, "small", each, 8) for each in ids]


@pytest.mark.parametrize("name", ["int8_groups", "nvfp4"])
@pytest.mark.parametrize("family", ["nemotron_h", "llama", "qwen3_moe"])
def test_quantized_checkpoints_are_served(family: str, name: str, tmp_path: Path) -> None:
    quantized(parent_of(family, tmp_path / "plain", torch.float32), tmp_path / "q", name)
    model = ElasticModel.from_pretrained(tmp_path / "q")
    engine = Engine(model, 3, max_length=40, step_tokens=9)
    ids = [prompt(length, length) for length in (12, 5, 20)]
    wanted = {engine.submit(Request(i, s, 7)): (s, i) for i in ids for s in ("full", "small")}
    found = answers(drain(engine))
    assert found == {id: alone(model, *request, 7) for id, request in wanted.items()}


def test_weights_are_the_parents_and_caches_are_allocated_once() -> None:
    model = elastic("llama")
    engine = Engine(model, 4, max_length=32, block_size=8)
    layout, small = model.layout, model.sizes["small"].config
    tokens = 4 * 32 + 4 * 8  # one block in part per sequence
    one = [layout.cache_bytes(tokens, 1, layout.sizes_of(f), "float32")["kv"] for f in ({}, small)]
    assert engine.cache_bytes == sum(one)  # small and prefix share a pool
    held = [tensor.data_ptr() for tensor in pool_tensors(engine)]
    for size in SIZES:
        engine.generate([prompt(9, n) for n in range(6)], size, 9)
    assert held == [tensor.data_ptr() for tensor in pool_tensors(engine)]
    assert model.copied_bytes(model["full"]) == model.copied_bytes(model["prefix"]) == 0
    assert engine.scheduler.preemptions == 0


def test_draws_do_not_depend_on_the_batch() -> None:
    """A seed gives the same answer alone, in a crowd, and through preemption."""
    model = elastic("nemotron_h")
    request = Request(prompt(9, 0), "small", 20, Sampling(temperature=1.5, top_p=0.9, seed=5))
    engine = Engine(model, 4, max_length=48, cache_tokens=60, step_tokens=13, block_size=4)
    first = engine.submit(request)
    lonely = answers(drain(engine))[first]
    for number in range(6):
        engine.submit(Request(prompt(9 + number, number), "small", 20, Sampling(1.0)))
    last = engine.submit(request)
    assert answers(drain(engine))[last] == lonely
    assert engine.scheduler.preemptions > 0
    other = Sampling(temperature=1.5, top_p=0.9, seed=6)
    assert engine.generate([request.prompt], "small", 20, other) != [lonely]


def test_draws_are_those_of_the_whole_models_logits() -> None:
    """One generator for the whole answer; penalties see the answer, not the prompt."""
    model = elastic("llama")
    sampling = Sampling(temperature=2.0, seed=3, presence_penalty=1.0, repetition_penalty=1.2)
    generator, ids, expected = sampling.generator(), prompt(8, 0), []
    for _ in range(12):
        said = logits(model["full"], torch.tensor([[*ids, *expected]]))[0, -1]
        expected.append(choose(said, sampling, ids, expected, generator).token)
    engine = Engine(model, 2, max_length=32, step_tokens=6, sizes=["full"])
    assert engine.generate([ids], "full", 12, sampling) == [expected]


def test_an_answer_stops_at_a_stop_token() -> None:
    model = elastic("qwen3")
    ids = prompt(6, 0)
    whole = alone(model, "full", ids, 12)
    stop = whole[3]
    expected = whole[: whole.index(stop) + 1]
    engine = Engine(model, 2, max_length=32)
    id = engine.submit(Request(ids, "full", 12, Sampling(stop_ids=frozenset({stop}))))
    events = drain(engine)
    assert answers(events) == {id: expected} and ends(events) == {id: "stop"}
    assert events[-1].token == stop  # the last token and the end are one event
    config: Any = model["full"].generation_config
    for own in (stop, [stop, 1]):
        config.eos_token_id = own
        assert engine.generate([ids], "full", 12) == [expected]
        assert engine.generate([ids], "full", 12, Sampling(stop_ids=frozenset())) == [whole]


def test_logprobs_are_those_of_the_model() -> None:
    model = elastic("nemotron_h")
    engine = Engine(model, 1, max_length=32, step_tokens=5)
    ids = prompt(9, 4)
    engine.submit(Request(ids, "small", 5, Sampling(logprobs=2)))
    events = drain(engine)
    tokens = [event.token for event in events]
    said = logits(model["small"], torch.tensor([[*ids, *tokens]]))[0].log_softmax(-1)
    for place, event in enumerate(events, len(ids) - 1):
        best = said[place].topk(2)
        assert event.logprob == pytest.approx(float(said[place, event.token]), abs=1e-4)
        assert [token for token, _ in event.top] == best.indices.tolist()
        assert [value for _, value in event.top] == pytest.approx(best.values.tolist(), abs=1e-4)


@pytest.mark.parametrize("family", ["nemotron_h", "llama"])
def test_a_request_that_fails_fails_alone(family: str) -> None:
    """One token makes the model raise, another makes it say NaN, in the midst of a batch."""
    model = elastic(family)
    ids = [prompt(7, seed) for seed in range(3)]
    expected = [alone(model, "full", each, 8) for each in ids]
    bad, sick = sorted(set(range(VOCAB)).difference(*ids, *expected))[-2:]

    def raise_or_not(_: Any, __: Any, given: dict[str, Any]) -> None:
        if bool((given["input_ids"] == bad).any()):
            raise RuntimeError("no such thing")

    def spoil(_: Any, given: tuple[Any, ...], output: Any) -> Any:
        return output.masked_fill((given[0] == sick)[..., None], torch.nan)

    model["full"].register_forward_pre_hook(raise_or_not, with_kwargs=True)
    model["full"].get_input_embeddings().register_forward_hook(spoil)
    engine = Engine(model, 8, max_length=32)
    good = [engine.submit(Request(each, "full", 8)) for each in ids]
    raising = engine.submit(Request([*ids[0][:6], bad], "full", 8))
    spoilt = engine.submit(Request([*ids[1][:6], sick], "full", 8))
    events = drain(engine)
    found = answers(events)
    assert [found[id] for id in good] == expected
    assert ends(events) == dict.fromkeys(good, "length") | {raising: "error", spoilt: "error"}
    errors = {event.id: event.error for event in events if event.error}
    assert errors[raising] == "RuntimeError: no such thing"
    assert "not finite" in str(errors[spoilt])
    assert engine.generate(ids, "full", 8) == expected  # and lives on, in slots used by those
    with pytest.raises(RuntimeError, match="no such thing"):
        engine.generate([ids[0], [bad]], "full", 8)
    assert not engine.busy


def test_cancelled_in_every_phase() -> None:
    model = elastic("nemotron_h")
    engine = Engine(model, 2, max_length=40, step_tokens=5, sizes=["full"])
    decoding, reading, queued = (
        engine.submit(Request(prompt(length, length), "full", 9)) for length in (3, 20, 4)
    )
    engine.step()
    engine.step()
    kept = engine.submit(Request(prompt(11, 8), "full", 9))
    jobs = engine.scheduler.jobs
    assert jobs[decoding].num_uncached == 1 and 0 < jobs[reading].num_cached < 19
    assert jobs[queued].slot is None
    for id in (decoding, reading, queued):
        assert engine.cancel(id) and not engine.cancel(id)
    assert engine.stats.running == 0
    events = drain(engine)
    assert ends(events) == {decoding: "cancelled", reading: "cancelled", queued: "cancelled"} | {
        kept: "length"
    }
    assert answers(events) == {kept: alone(model, "full", prompt(11, 8), 9)}
    assert not engine.cancel(kept) and not engine.cancel(999)


def test_generate_leaves_other_requests_their_events() -> None:
    model = elastic("qwen2")
    engine = Engine(model, 3, max_length=32)
    other = engine.submit(Request(prompt(5, 1), "small", 6))
    dropped = engine.submit(Request(prompt(5, 2), "small", 6))
    engine.cancel(dropped)
    assert engine.generate([prompt(7, 3)], "full", 9) == [alone(model, "full", prompt(7, 3), 9)]
    events = drain(engine)
    assert answers(events) == {other: alone(model, "small", prompt(5, 1), 6)}
    assert ends(events) == {other: "length", dropped: "cancelled"}


@pytest.mark.parametrize(
    ("request_", "named"),
    [
        (Request([1, 2], "medium"), "no size 'medium'; there are full, small"),
        (Request([], "full"), "prompt: no token"),
        (Request([1], "full", 0), "max_tokens 0"),
        (Request([1] * 20, "full", 13), "33 tokens of prompt and answer: at most 32"),
        (Request([1, 64], "full"), "token 64: the vocabulary has 64"),
        (Request([-1], "full"), "token -1"),
        (Request([1], "full", sampling=Sampling(logit_bias={99: 1.0})), "token 99"),
    ],
)
def test_requests_that_cannot_be_served_are_refused(request_: Request, named: str) -> None:
    engine = Engine(elastic("llama"), 2, max_length=32, sizes=["full", "small"])
    with pytest.raises(ValueError, match=named):
        engine.submit(request_)
    assert not engine.busy


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"slots": 0}, "slots 0"),
        ({"max_length": 0}, "max_length 0"),
        ({"max_length": 129}, "the model has 128 positions"),
        ({"block_size": 0}, "block_size 0"),
        ({"cache_tokens": 31}, "cache_tokens 31: must be at least max_length 32"),
        ({"step_tokens": 4}, "step_tokens 4: must be above 4"),
        ({"sizes": ["full", "tiny"]}, "no size 'tiny'"),
    ],
)
def test_engines_without_room_are_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Engine(elastic("llama"), **{"slots": 2, "max_length": 32, **changes})
