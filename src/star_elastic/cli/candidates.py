"""Sizes within a budget, from wherever they come: what `fit` compares and `slice` cuts."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from star_elastic.budget import Kind, Metric
    from star_elastic.checkpoint import Checkpoint
    from star_elastic.submodel import Fields, Submodel

_ROUTER = "router.safetensors"


@dataclass(frozen=True)
class Candidate:
    """One proposal: where it comes from, its fields, its cost, its loss if anybody measured it."""

    name: str
    fields: "Fields"
    cost: float
    loss: float | None = None
    trained: bool = False


def budget_of(given: Mapping[str, str | None], verb: str) -> tuple["Kind", float]:
    """The kind of metric and the budget in its unit, from the flags' texts.

    Raises:
        ValueError: none of them or several, or no such number.
    """
    from star_elastic.budget import parse_bytes, parse_count, parse_milliseconds

    flags = {kind: "--latency-ms" if kind == "latency" else f"--{kind}" for kind in given}
    said: list[tuple[Any, str]] = [(kind, text) for kind, text in given.items() if text is not None]
    if len(said) != 1:
        *most, last = flags.values()
        raise ValueError(f"{verb}: say one of {', '.join(most)} and {last}")
    kind, text = said[0]
    if kind == "latency":
        return kind, parse_milliseconds(text, flags[kind])
    return kind, (parse_bytes if kind == "memory" else parse_count)(text, flags[kind])


def metric_of(opened: "Checkpoint", kind: "Kind", context: str, batch: int) -> "Metric":
    """Parameters, or memory in the checkpoint's own dtype."""
    from star_elastic.budget import Metric, parse_tokens
    from star_elastic.dtypes import dtype_of

    if kind != "memory":
        return Metric(kind=kind)
    dtype: Any = dtype_of(opened.config)
    tokens = parse_tokens(context, "--context")
    return Metric(kind=kind, context=tokens, batch=batch, dtype=dtype)


def proposed(
    opened: "Checkpoint",
    metric: "Metric",
    budget: float,
    steps: Mapping[str, int],
    console: Console,
) -> list[Candidate]:
    """Named sizes within the budget, the one between two of them, the router's choice."""
    from star_elastic.between import interpolate

    layout = opened.layout
    found = []
    for size in opened.space.submodels:
        cost = float(metric.cost(layout, layout.sizes_of(size.config)))
        if cost <= budget:
            found.append(Candidate(size.name, size.config, cost, _known(size), size.trained))
    if found:
        sizes = {name: size.config for name, size in opened.space.sizes.items()}
        fields = interpolate(layout, sizes, metric, budget, steps)
        cost = float(metric.cost(layout, layout.sizes_of(fields)))
        if fields not in [each.fields for each in found]:
            found.append(Candidate("between", fields, cost))
    return [*found, *router_candidate(opened, metric, budget, console)]


def searched(
    opened: "Checkpoint",
    offered: Mapping[str, Sequence[int]],
    metric: "Metric",
    budget: float,
    loss: Callable[["Fields"], float],
    evaluations: int,
    others: Sequence[Candidate],
    console: Console,
) -> list[Candidate]:
    """What the search finds; where it cannot reach the budget but others can, a note of it."""
    from star_elastic.search import search

    try:
        found = search(opened.layout, offered, metric, [budget], loss, evaluations)[budget]
    except ValueError as error:
        if not others:
            raise
        console.print(f"no search: {error}")
        return []
    console.print(f"searched: {found.evaluated} losses measured")
    return [Candidate("search", found.fields, found.cost, found.loss)]


def best_of(candidates: Sequence[Candidate], measured: bool) -> Candidate:
    """The lowest loss; unmeasured, what the router says, else what costs most."""
    if measured:
        return min(candidates, key=lambda each: math.inf if each.loss is None else each.loss)
    routed = [each for each in candidates if each.name == "router"]
    return (routed or [max(candidates, key=lambda each: each.cost)])[0]


def router_candidate(
    opened: "Checkpoint", metric: "Metric", budget: float, console: Console
) -> Iterator[Candidate]:
    """What the router beside the weights chooses, if there is one that counts in this metric."""
    path = opened.path / _ROUTER
    if not path.is_file():
        return
    from star_elastic.train.router import load_router

    router = load_router(path, opened.layout)
    counts = metric.kind in ("params", "active")  # no context, no batch
    if router.metric.kind != metric.kind or not (counts or router.metric == metric):
        console.print(f"{path.name}: passed over, it counts {router.metric.describe()}")
        return
    whole = float(metric.cost(opened.layout, opened.layout.sizes))
    for percent in range(100, 89, -1):  # it was taught to within a dead zone: ask for a bit less
        fields = router.fields(percent / 100 * budget / whole)
        cost = float(metric.cost(opened.layout, opened.layout.sizes_of(fields)))
        if cost <= budget:
            yield Candidate("router", fields, cost)
            return
    console.print(f"{path.name}: passed over, its choice costs {metric.amount(cost)}")


def print_candidates(
    console: Console,
    metric: "Metric",
    budget: float,
    candidates: Sequence[Candidate],
    best: Candidate,
) -> None:
    """Everything that was compared, the chosen one marked."""
    title = f"within {metric.amount(budget)} ({metric.describe()})"
    table = Table("", "candidate", "fields", "cost", "loss", title=title)
    for each in candidates:
        fields = ", ".join(f"{field}={value}" for field, value in each.fields.items())
        loss = "not measured" if each.loss is None else f"{each.loss:.4f}"
        mark = "*" if each is best else ""
        table.add_row(mark, each.name, fields or "the parent's", metric.amount(each.cost), loss)
    console.print(table)


def _known(size: "Submodel") -> float | None:
    """The stored loss of a named size, if it was measured."""
    from star_elastic.evaluate import mean

    return mean(size.quality, "nll")
