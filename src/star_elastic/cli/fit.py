"""`star-elastic fit`: the best size for a budget that nobody trained for."""

import json as json_
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from star_elastic.cli.candidates import (
    Candidate,
    best_of,
    budget_of,
    metric_of,
    print_candidates,
    proposed,
    searched,
)
from star_elastic.cli.table import print_sizes, size_row

if TYPE_CHECKING:
    from star_elastic.budget import Kind, Metric
    from star_elastic.checkpoint import Checkpoint
    from star_elastic.model import ElasticModel
    from star_elastic.submodel import ElasticSpace, Submodel


def fit(
    checkpoint: Annotated[str, typer.Argument(help="an elastic checkpoint: a folder, or a hub id")],
    params: Annotated[str | None, typer.Option(help="total parameters at most: 17B")] = None,
    active: Annotated[str | None, typer.Option(help="parameters a token uses: 2.5B")] = None,
    memory: Annotated[str | None, typer.Option(help="weights, cache and states: 24GiB")] = None,
    latency_ms: Annotated[str | None, typer.Option(help="milliseconds of one call: 20")] = None,
    context: Annotated[str, typer.Option(help="tokens a sequence, for memory, latency")] = "4k",
    batch: Annotated[int, typer.Option(help="sequences, for memory and latency", min=1)] = 1,
    prefill: Annotated[
        bool, typer.Option("--prefill", help="time the prefill, not one decode step")
    ] = False,
    latency_table: Annotated[
        Path | None, typer.Option(help="latency.json to read; measured and written if not there")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="records, JSONL: search, and let the measured loss decide")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="use the first N records")] = None,
    multiple_of: Annotated[
        list[str] | None, typer.Option(help="steps of a field: hidden_size=64")
    ] = None,
    axes: Annotated[list[str] | None, typer.Option(help="search along these fields only")] = None,
    evaluations: Annotated[int, typer.Option(help="losses to measure in the search")] = 100,
    store: Annotated[str | None, typer.Option(help="declare the size under this name")] = None,
    json: Annotated[bool, typer.Option("--json", help="one object")] = False,
) -> None:
    """Find the best size within a budget, trained for or not, and say how good it is.

    Named sizes, the size between the two that enclose the budget, and what a trained router
    chooses are compared. With --data a search joins them and the lowest measured loss wins.
    """
    from star_elastic import stock
    from star_elastic.between import too_small
    from star_elastic.checkpoint import Checkpoint
    from star_elastic.model import ElasticModel
    from star_elastic.search import calibration_loss

    stock.quiet()
    console = Console(stderr=True)
    opened = Checkpoint.open(checkpoint)
    if store is not None:
        _check_name(opened, store)
    said = {"params": params, "active": active, "memory": memory, "latency": latency_ms}
    kind, budget = budget_of(said, "fit")
    steps = _steps(opened.space, multiple_of or [])
    offered = _offered(opened, axes or [], steps)
    timed = kind == "latency" and not (latency_table and latency_table.is_file())
    model = ElasticModel.from_pretrained(checkpoint, check_digests=False) if data or timed else None
    metric = _metric(opened, kind, context, batch, prefill, latency_table, model, offered, console)
    loss = None
    if data is not None and model is not None:
        loss = calibration_loss(model, _records(model, data, limit))
    candidates = proposed(opened, metric, budget, steps, console)
    if not candidates and loss is None:
        raise too_small(metric, budget, _least(opened, metric))
    if loss is not None:
        candidates = [replace(each, loss=loss(each.fields)) for each in candidates]
        candidates += searched(
            opened, offered, metric, budget, loss, evaluations, candidates, console
        )
    best = best_of(candidates, loss is not None)
    size = _submodel(opened, best, store or "fit", loss is not None)
    if store is not None:
        _store(opened, size)
    _print(opened, metric, budget, candidates, best, size, json)


def _steps(space: "ElasticSpace", texts: Sequence[str]) -> dict[str, int]:
    """The step of every axis: as declared, unless --multiple-of says otherwise."""
    from star_elastic.budget import parse_field

    steps = {field: axis.multiple_of for field, axis in space.axes.items()}
    for field, step in (parse_field(text, "--multiple-of") for text in texts):
        if field not in steps or step < 1:
            raise ValueError(
                f"--multiple-of {field}={step}: not a positive step of one of the axes declared: "
                f"{', '.join(steps) or 'none'}"
            )
        steps[field] = step
    return steps


def _offered(
    opened: "Checkpoint", axes: Sequence[str], steps: Mapping[str, int]
) -> dict[str, list[int]]:
    from star_elastic.budget import choices

    declared = {field: axis.choices for field, axis in opened.space.axes.items()}
    for field in axes:
        if field not in declared:
            raise ValueError(f"--axes {field}: not one of those declared: {', '.join(declared)}")
    return choices(opened.layout, {f: declared[f] for f in axes or declared}, steps)


def _metric(
    opened: "Checkpoint",
    kind: "Kind",
    context: str,
    batch: int,
    prefill: bool,
    path: Path | None,
    model: "ElasticModel | None",
    offered: Mapping[str, Sequence[int]],
    console: Console,
) -> "Metric":
    from star_elastic import latency
    from star_elastic.budget import Metric, parse_tokens

    if kind != "latency":
        return metric_of(opened, kind, context, batch)
    tokens = parse_tokens(context, "--context")
    if path is not None and path.is_file():
        table = latency.load(path, opened.layout)
        console.print(f"latency read from {path}")
    else:
        assert model is not None
        grid = latency.spot_grid(opened.layout, offered)
        mode: latency.Mode = "prefill" if prefill else "decode"
        table = latency.measure(model, grid, mode, batch, tokens)
        if path is not None:
            latency.save(table, path)
        console.print(f"latency measured over {grid}, {f'kept in {path}' if path else 'not kept'}")
    return Metric(kind="latency", table=table)


def _least(opened: "Checkpoint", metric: "Metric") -> float:
    layout, sizes = opened.layout, opened.space.submodels
    return min(float(metric.cost(layout, layout.sizes_of(size.config))) for size in sizes)


def _records(model: "ElasticModel", data: Path, limit: int | None) -> list[Any]:
    from star_elastic.records import read_records

    if model.tokenizer is None:
        raise ValueError(f"{model.source}: no tokenizer_config.json; --data needs a tokenizer")
    if limit is not None and limit < 1:
        raise ValueError(f"--limit {limit}: at least one record")
    return read_records(data)[:limit]


def _check_name(opened: "Checkpoint", name: str) -> None:
    """Refuse a name before anything is measured for it."""
    from pydantic import ValidationError

    from star_elastic.submodel import submodel

    if name in opened.space.sizes:
        raise ValueError(f"--store {name}: {opened.path} has a size of this name")
    try:
        submodel(opened.layout, name, {}, trained=False)
    except ValidationError as error:
        raise ValueError(f"--store {name}: {error.errors()[0]['msg']}") from None


def _submodel(opened: "Checkpoint", best: Candidate, name: str, measured: bool) -> "Submodel":
    from star_elastic.submodel import submodel

    size = submodel(opened.layout, name, best.fields, best.trained)
    quality = {"calibration": {"nll": best.loss}} if measured else {}
    return size.model_copy(update={"quality": quality})


def _store(opened: "Checkpoint", size: "Submodel") -> None:
    """Declare one more size; its axes take its values among their choices."""
    from star_elastic.checkpoint import declare
    from star_elastic.submodel import Axis

    axes = dict(opened.space.axes)
    for field, value in size.config.items():
        whole = opened.layout.sizes[field]
        values = value if isinstance(value, list) else [value]
        axis = axes.get(field, Axis(choices=[whole]))
        multiple = math.gcd(axis.multiple_of, *(each for each in values if each != whole))
        choices = sorted({*axis.choices, *values})
        axes[field] = Axis(choices=choices, multiple_of=multiple)
    submodels = [*opened.space.submodels, size]
    declare(opened, opened.space.model_copy(update={"axes": axes, "submodels": submodels}))


def _print(
    opened: "Checkpoint",
    metric: "Metric",
    budget: float,
    candidates: Sequence[Candidate],
    best: Candidate,
    size: "Submodel",
    as_json: bool,
) -> None:
    from star_elastic.card import warning

    row = size_row(opened, size)
    if as_json:
        tried = [{**vars(each), "fields": dict(each.fields)} for each in candidates]
        found = {"metric": metric.describe(), "budget": budget, "best": best.name}
        print(json_.dumps({**found, "size": row, "candidates": tried}, indent=2))
        return
    print_candidates(Console(), metric, budget, candidates, best)
    print_sizes([row], False)
    if text := warning(size, opened.space):
        Console().print(f"[red]{size.name}: {text}[/red]")
