"""Outcomes of records, by asking the sizes through the engine: answers, or probes alone."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from star_elastic.model import ElasticModel
from star_elastic.records import final_answer
from star_elastic.serve.difficulty.features import Probe, probe_of
from star_elastic.serve.difficulty.graded import Graded
from star_elastic.serve.difficulty.outcomes import Outcomes
from star_elastic.serve.engine import Engine, Event, Request
from star_elastic.serve.sampling import Sampling

LOGPROBS = 20  # of the likeliest tokens, for each token of a probe
Tell = Callable[[str, int, int], None]  # size, requests done, requests


def ask(
    model: ElasticModel,
    records: Sequence[Graded],
    sizes: Sequence[str],
    probe_tokens: int,
    max_tokens: int = 256,
    slots: int = 16,
    tell: Tell = lambda size, done, count: None,
) -> Outcomes:
    """What comes of the records at some sizes of a model.

    Records that are graded are only probed; where they do not say how long answers are, they count
    as `max_tokens`.

    Args:
        sizes: names, in any order.
        probe_tokens: the longest probe wanted; 0: none.
        max_tokens: of an answer.
        slots: requests at once.

    Raises:
        ValueError: no tokenizer, a size that is not there, a prompt that cannot be asked, or that
            the engine fails at.
    """
    names = _names(model, sizes)
    prompts = _prompts(model, records)
    graded = records[0].outcomes is not None
    asked = names[: 1 if probe_tokens else 0] if graded else names
    length = probe_tokens if graded else max_tokens
    probes: list[Probe] = [[] for _ in records]
    quality_ns, tokens_ns = _told(records, names, max_tokens)
    engine = _engine(model, asked, slots, max(map(len, prompts)) + length)
    for place, name in enumerate(asked):
        sampling = Sampling(logprobs=LOGPROBS if place == 0 and probe_tokens else None)
        for row, events in _run(engine, prompts, name, length, sampling, tell):
            if place == 0 and probe_tokens:
                probes[row] = probe_of(events, probe_tokens)
            if not graded:
                answer = [event.token for event in events if event.token is not None]
                quality_ns[row, place] = _right(model.tokenizer, answer, records[row])
                tokens_ns[row, place] = len(answer)
    prices = tuple(float(model.sizes[name].active_params) for name in names)
    texts, lengths = [record.text for record in records], list(map(len, prompts))
    return Outcomes(tuple(names), prices, texts, lengths, probes, quality_ns, tokens_ns)


def _names(model: ElasticModel, sizes: Sequence[str]) -> list[str]:
    """Smallest first."""
    for name in sizes:
        if name not in model.sizes:
            raise ValueError(f"no size {name!r}; there are {', '.join(model.sizes)}")
    return sorted(sizes, key=lambda name: model.sizes[name].active_params)


def _prompts(model: ElasticModel, records: Sequence[Graded]) -> list[list[int]]:
    if model.tokenizer is None:
        raise ValueError(f"{model.source}: no tokenizer_config.json; prompts need a tokenizer")
    return [_ids(model.tokenizer, record, number) for number, record in enumerate(records, 1)]


def _engine(model: ElasticModel, sizes: Sequence[str], slots: int, length: int) -> Engine | None:
    """None if there is nothing to ask: caches are not for nothing."""
    return Engine(model, slots=slots, max_length=length, sizes=sizes) if sizes else None


def _ids(tokenizer: Any, record: Graded, number: int) -> list[int]:
    try:
        return record.ids(tokenizer)
    except ValueError as error:
        raise ValueError(f"record {number}: {error}") from None


def _told(
    records: Sequence[Graded], names: Sequence[str], max_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """Quality and lengths as the records tell them."""
    grades = [[(record.outcomes or {}).get(name, 0.0) for name in names] for record in records]
    lengths = [
        [(record.tokens or {}).get(name, max_tokens) for name in names] for record in records
    ]
    return np.array(grades, np.float64), np.array(lengths, np.float64)


def _run(
    engine: Engine | None,
    prompts: Sequence[Sequence[int]],
    size: str,
    max_tokens: int,
    sampling: Sampling,
    tell: Tell,
) -> Iterator[tuple[int, list[Event]]]:
    """The events of each prompt's answer, as answers end."""
    assert engine is not None
    rows = {engine.submit(Request(p, size, max_tokens, sampling)): n for n, p in enumerate(prompts)}
    events: dict[int, list[Event]] = {id: [] for id in rows}
    while events:
        for event in engine.step():
            events[event.id].append(event)
            if event.finish is None:
                continue
            if event.error is not None:
                raise ValueError(f"size {size}: record {rows[event.id] + 1}: {event.error}")
            yield rows[event.id], events.pop(event.id)
            tell(size, len(prompts) - len(events), len(prompts))


def _right(tokenizer: Any, answer: Sequence[int], record: Graded) -> float:
    text = tokenizer.decode(answer, skip_special_tokens=True)
    return float(final_answer(text) == (record.answer or "").strip())
