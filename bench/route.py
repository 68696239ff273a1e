"""Claim: routing by difficulty is above random mixing at the same cost, at every point.

Two sizes of a checkpoint answer held-out problems of `demo/problems.py`; half of the problems fit
the router and choose its thresholds, the other half only measures. Cost is active parameters times
tokens, of prompt and answer, the probe included where a larger size answers after it. A seed is
other problems and another split; intervals are 95 % bootstraps over a seed's test problems.

Beside the router stand: the prompt's length alone, the prompt alone, the probe's mean log
probability alone, and the oracle, which knows what comes out. The checkpoint must have sizes that
differ: the demo's are within 1 %, so it is one trained for a fifth of the demo's steps.

    star-elastic train recipes/demo.yaml --out runs/short --set train.stages.0.steps=150
    python -m bench.route runs/short/elastic --seeds 3 --problems 2000
"""

import argparse
import itertools
import json
import platform
import random
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from demo.problems import make_problems
from star_elastic import stock
from star_elastic.budget import parse_field
from star_elastic.model import ElasticModel
from star_elastic.serve.difficulty.asking import LOGPROBS, ask
from star_elastic.serve.difficulty.curve import Point, measure
from star_elastic.serve.difficulty.features import NAMES, PROMPT, Probe
from star_elastic.serve.difficulty.file import Difficulty
from star_elastic.serve.difficulty.fitting import fit, split
from star_elastic.serve.difficulty.graded import Graded
from star_elastic.serve.difficulty.outcomes import Outcomes
from star_elastic.serve.difficulty.thresholds import choose, thresholds
from star_elastic.serve.engine import Engine
from star_elastic.serve.sampling import Sampling
from star_elastic.submodel import submodel

PROBES = (1, 4, 8)  # tokens; a router may also do without
MAX_TOKENS = 96


@dataclass(frozen=True)
class Kind:
    """A router and what it may look at."""

    name: str
    probes: Sequence[int]
    features: Sequence[str]


KINDS = (
    Kind("router", (0, *PROBES), NAMES),
    Kind("prompt alone", (0,), PROMPT),
    Kind("length alone", (0,), ("log_characters", "log_tokens")),
    Kind("confidence alone", PROBES, ("mean_logprob",)),
)


def drawn(count: int, seed: int) -> list[Graded]:
    """Different held-out problems; there are 232 of knowledge, so most are of the other kinds."""
    found: dict[str, dict[str, str]] = {}
    for part in itertools.count():
        for problem in make_problems(690, "heldout", 1000 * seed + part):
            found.setdefault(problem["prompt"], problem)
        if len(found) >= count:
            break
    problems = list(found.values())
    random.Random(seed).shuffle(problems)
    return [Graded.model_validate(problem) for problem in problems[:count]]


def outcomes_of(model: ElasticModel, sizes: Sequence[str], problems: int, seed: int) -> Outcomes:
    """What the sizes answer to a seed's problems."""
    return ask(model, drawn(problems, seed), sizes, max(PROBES), MAX_TOKENS, slots=32)


def rows(outcomes: Outcomes, seed: int) -> dict[str, Any]:
    """Every kind of router of one seed, on the same test problems."""
    found: dict[str, Any] = {}
    shares: list[float] = []
    for kind in KINDS:
        fitted = fit(outcomes, kind.probes, seed=seed, held_out=0.5, names=kind.features)
        shares = [setting.share for setting in fitted.table]
        table = [setting.model_dump(exclude={"thresholds"}) for setting in fitted.table]
        told = fitted.provenance.model_dump(include={"auc", "calibration_error"})
        found[kind.name] = {"table": table, **told}
    _, measuring = split(outcomes, 0.5, seed)
    found["oracle"] = {"table": oracle(measuring, shares, seed)}
    pure = measuring.costs().mean(0)
    return {
        "accuracy": dict(zip(outcomes.sizes, measuring.quality_ns.mean(0).tolist(), strict=True)),
        "cost_share": dict(zip(outcomes.sizes, pure.tolist(), strict=True)),
        "gained": float(measuring.gained.mean()),
        "kinds": found,
    }


def oracle(measuring: Outcomes, shares: Sequence[float], seed: int) -> list[dict[str, Any]]:
    """Whoever knows the outcomes, without a probe, at the same targets."""
    truth_ns, cost_ns = measuring.quality_ns, measuring.costs()
    gain_n = truth_ns[:, -1] - truth_ns[:, 0]
    # of equal gains the cheaper ones first: ties would all be taken, or none
    tie_n = 1e-3 * (cost_ns[:, -1] - cost_ns[:, 0]) / cost_ns[:, -1].max()
    known_ns = np.stack([np.zeros_like(gain_n), gain_n - tie_n], 1)
    chosen = [choose(gain_n - tie_n, thresholds(known_ns, cost_ns, share)) for share in shares]
    points = measure(measuring, chosen, [0] * len(shares), seed)
    return [{"share": share, **row(point)} for share, point in zip(shares, points, strict=True)]


def row(point: Point) -> dict[str, Any]:
    """A point as JSON."""
    return {**vars(point), "difference": point.difference.model_dump()}


def share_for(table: Sequence[Mapping[str, Any]], accuracy: float) -> float | None:
    """The least measured cost share that reaches an accuracy; None if no point does."""
    return min((each["cost_share"] for each in table if each["accuracy"] >= accuracy), default=None)


def decision_ms(fitted: Difficulty, outcomes: Outcomes) -> dict[str, dict[str, float]]:
    """Of telling the difficulty by the longest probe, of these prompts and of very long ones."""
    long = ["\n".join(outcomes.texts)[:100_000]] * 200
    probe = outcomes.probes[0]
    return {
        "problems": _decisions(fitted, outcomes.texts, probe),
        "100,000 characters": _decisions(fitted, long, probe),
    }


def _decisions(fitted: Difficulty, texts: Sequence[str], probe: Probe) -> dict[str, float]:
    times = []
    for text in texts:
        start = time.perf_counter()
        fitted.of(text, len(text), probe, max(PROBES))
        times.append(1e3 * (time.perf_counter() - start))
    times.sort()
    return {"p50": statistics.median(times), "p99": times[int(0.99 * len(times))]}


def probe_ms(model: ElasticModel, size: str, prompts: Sequence[Sequence[int]]) -> dict[str, float]:
    """Milliseconds of a probe alone on the engine, by tokens, and of a whole answer."""
    engine = Engine(model, slots=1, max_length=256, sizes=[size])
    found = {}
    for tokens in (*PROBES, MAX_TOKENS):
        times = []
        for prompt in prompts:
            start = time.perf_counter()
            engine.generate([prompt], size, tokens, Sampling(logprobs=LOGPROBS))
            times.append(1e3 * (time.perf_counter() - start))
        found["answer" if tokens == MAX_TOKENS else str(tokens)] = statistics.median(times)
    return found


def pooled(apart: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean difference of all seeds, and its interval, their draws taken as independent.

    Nearly: all have the 232 problems of knowledge, split anew, and a few others in common.
    """
    mean = statistics.mean(each["mean"] for each in apart)
    half = sum(((each["high"] - each["low"]) / 2) ** 2 for each in apart) ** 0.5 / len(apart)
    return {"low": mean - half, "mean": mean, "high": mean + half}


def points(seeds: Sequence[Mapping[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Every target of a kind of router: means over seeds, and the difference of all."""
    found = []
    for each in zip(*(seed["kinds"][kind]["table"] for seed in seeds), strict=True):
        keys = ("share", "cost_share", "accuracy", "random")
        means = {key: statistics.mean(row[key] for row in each) for key in keys}
        probes = [row.get("probe_tokens", 0) for row in each]
        apart = pooled([row["difference"] for row in each])
        found.append({**means, "probe_tokens": probes, "difference": apart})
    return found


def lines(seeds: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The table for people."""
    yield "kind               target    cost  accuracy  random  difference (95 %)        probes"
    for kind in seeds[0]["kinds"]:
        for at in points(seeds, kind):
            apart = at["difference"]
            yield (
                f"{kind:<17} {at['share']:>7.1%} {at['cost_share']:>7.1%} {at['accuracy']:>9.1%} "
                f"{at['random']:>7.1%}  {apart['mean']:>+6.1%} ({apart['low']:+.1%} to "
                f"{apart['high']:+.1%})  {at['probe_tokens']}"
            )


def sides(apart: Sequence[Mapping[str, float]]) -> dict[str, int]:
    """How many points are above random mixing, below it, or not told apart from it."""
    above = sum(each["low"] > 0 for each in apart)
    below = sum(each["high"] < 0 for each in apart)
    return {"above": above, "below": below, "undecided": len(apart) - above - below}


def summary(seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of every kind: points of all seeds together, points of each seed, and what 95 % cost."""
    found: dict[str, Any] = {}
    for kind in seeds[0]["kinds"]:
        single = [row["difference"] for seed in seeds for row in seed["kinds"][kind]["table"]]
        found[kind] = {
            "points": sides([at["difference"] for at in points(seeds, kind)]),
            "points_of_single_seeds": sides(single),
            "auc": [seed["kinds"][kind].get("auc") for seed in seeds],
            "cost_share_at_95_percent_of_the_large": [
                share_for(seed["kinds"][kind]["table"], 0.95 * list(seed["accuracy"].values())[-1])
                for seed in seeds
            ],
        }
    return found


def opened(path: str, small: str, cut: Sequence[str]) -> ElasticModel:
    """The checkpoint; its small size is one of its own, or cut here by fields, untrained."""
    model = ElasticModel.from_pretrained(path, check_digests=False)
    if cut:
        fields = dict(parse_field(text, "--cut") for text in cut)
        base = model.sizes[small].config
        made = submodel(model.layout, "cut", {**base, **fields}, trained=False)
        sizes = [*model.space.submodels, made]
        model.space = model.space.model_copy(update={"submodels": sizes})
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("checkpoint")
    parser.add_argument("--small", default="small")
    parser.add_argument("--large", default="full")
    parser.add_argument("--cut", action="append", default=[], help="hidden_size=56 of the small")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--problems", type=int, default=2000)
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    asked = parser.parse_args()
    stock.quiet()
    model = opened(asked.checkpoint, asked.small, asked.cut)
    sizes = ["cut" if asked.cut else asked.small, asked.large]
    seeds, outcomes = [], None
    for seed in range(asked.seeds):
        outcomes = outcomes_of(model, sizes, asked.problems, seed)
        seeds.append(rows(outcomes, seed))
        print(f"seed {seed}: {seeds[-1]['accuracy']}, cost {seeds[-1]['cost_share']}", flush=True)
        print("\n".join(lines(seeds[-1:])), flush=True)
    assert outcomes is not None
    prompts = [record.ids(model.tokenizer) for record in drawn(30, asked.seeds)]
    figures = {
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
        "arguments": {key: str(value) for key, value in vars(asked).items()},
        "kinds": summary(seeds),
        "decision_ms": decision_ms(fit(outcomes, (max(PROBES),)), outcomes),
        "probe_ms": probe_ms(model, sizes[0], prompts),
    }
    print(f"all {asked.seeds} seeds")
    print("\n".join(lines(seeds)))
    print(json.dumps(figures))
    if asked.out is not None:
        asked.out.write_text(json.dumps({**figures, "seeds": seeds}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
