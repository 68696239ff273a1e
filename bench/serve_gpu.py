"""Claim: sizes of a 30B-shaped parent decode faster than it, out of its one copy of the weights.

Published for Nemotron Elastic on an H100, each model at the largest batch that it had room for (36,
108 and 224 sequences): 1.8 and 2.4 times the parent's tokens a second. Here the weights are random,
and the three share one copy, so that room is what the parent leaves.

    python -m bench.gpu serve                      # wants 80 GB
    python -m bench.gpu serve --layers 8 --batches 8,8,8
"""

import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from bench.nano import PATTERN, SIZES, nano_config
from star_elastic.model import ElasticModel
from star_elastic.serve.engine import Engine, Request
from star_elastic.serve.sampling import Sampling
from star_elastic.submodel import ElasticSpace

_PROMPT = 32  # tokens
_ENDLESS = Sampling(stop_ids=frozenset())


def serve(
    layers: int, experts: int, batches: Sequence[int], tokens: int, repeats: int, device: str
) -> dict[str, Any]:
    """Tokens a second of each size at its batch, medians of `repeats` runs in turns."""
    model = _model(PATTERN[:layers], experts, device)
    at = dict(zip(SIZES, batches, strict=True))
    # one size at a time has its caches: together they would not fit
    rates: dict[str, list[float]] = {size: [] for size in SIZES}
    for turn in range(repeats + 1):  # the first warms up
        for size, found in rates.items():
            rate = _rate(model, size, at[size], tokens)
            if turn:
                found.append(rate)
    speed = {size: median(found) for size, found in rates.items()}
    return {
        "batches": at,
        "tokens a second": {size: round(rate, 1) for size, rate in speed.items()},
        "over the parent": {size: round(rate / speed["full"], 2) for size, rate in speed.items()},
        "weights GiB": round(sum(each.nbytes for each in model.state.values()) / 2**30, 2),
    }


def _model(pattern: str, experts: int, device: str) -> ElasticModel:
    with torch.device(device):
        parent = AutoModelForCausalLM.from_config(
            nano_config(pattern, experts), dtype=torch.bfloat16
        )
    model = ElasticModel(parent.eval())
    model.space = ElasticSpace.of(model.layout, SIZES, trained=True)
    return model


def _rate(model: ElasticModel, size: str, batch: int, tokens: int) -> float:
    """Of decoding alone: the clock starts when every sequence has its first token."""
    engine = Engine(
        model,
        slots=batch,
        max_length=_PROMPT + tokens + 1,
        step_tokens=batch * _PROMPT + batch + 1,
        sizes=[size],
        reuse=False,
    )
    for row in range(batch):
        prompt = [(7 * row + 11 * n) % 1000 + 1 for n in range(_PROMPT)]
        engine.submit(Request(prompt, size, tokens + 1, _ENDLESS))
    made = 0
    while made < batch:
        made += len(engine.step())
    start, made = time.perf_counter(), 0
    while engine.busy:
        made += len(engine.step())
    return made / (time.perf_counter() - start)
