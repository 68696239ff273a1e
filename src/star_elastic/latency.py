"""Latency measured on the user's own device: every point of a grid of sizes, timed on views.

Flextron (arXiv 2406.10260) looks latency up in such a table. Passes over the grid are interleaved,
so that a machine that slows down does not blame one size, and a point's time is the median.
"""

import itertools
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from transformers import PreTrainedModel

from star_elastic.budget import LatencyTable
from star_elastic.folder import CheckpointError, read_json, replace_json
from star_elastic.layout import Layout
from star_elastic.model import ElasticModel

MOST_POINTS = 256
_SPOT_POINTS = 64  # of a grid nobody chose
Mode = Literal["prefill", "decode"]


def measure(
    model: ElasticModel,
    axes: Mapping[str, Sequence[int]],
    mode: Mode = "decode",
    batch: int = 1,
    context: int = 512,
    repeats: int = 5,
    on_point: Callable[[int, int], None] = lambda done, total: None,
) -> LatencyTable:
    """Time every combination of the axes' choices, the other fields being the parent's.

    Args:
        mode: `prefill` runs `batch` sequences of `context` tokens; `decode` one more token of each,
            on a cache of `context` (the cache grows by one with every timed call).
        repeats: passes over the whole grid.
        on_point: told (points timed, points to time).

    Raises:
        ValueError: no axis, more than 256 points, or a point that this parent cannot hold.
    """
    grid = {field: sorted(set(choices)) for field, choices in axes.items()}
    points = list(_points(grid))
    times: list[list[float]] = [[] for _ in points]
    for done, (n, fields) in enumerate(list(enumerate(points)) * repeats, 1):
        try:
            view = model.submodel(**fields)
        except ValueError as error:
            raise ValueError(f"latency: {error}") from None
        times[n] += _time(view, mode, batch, context)
        on_point(done, len(points) * repeats)
    return LatencyTable(
        device=device_name(model.parent.device),
        dtype=str(model.parent.dtype).removeprefix("torch."),
        mode=mode,
        batch=batch,
        context=context,
        axes=grid,
        milliseconds=[statistics.median(found) for found in times],
    )


def spot_grid(layout: Layout, choices: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """A small grid over choices on offer: ends and middle, or ends, of the axes that save most.

    At most 64 points; an axis left out is timed at the parent's value.
    """
    whole = layout.count()
    least = {field: {field: values[0]} for field, values in choices.items() if len(values) > 1}
    saved = {field: whole - layout.count(layout.sizes_of(cut)) for field, cut in least.items()}
    fields = sorted(saved, key=lambda field: -saved[field])
    while 2 ** len(fields) > _SPOT_POINTS:
        fields.pop()
    middle = 3 ** len(fields) <= _SPOT_POINTS
    return {
        field: sorted({values[0], values[-1], *([values[len(values) // 2]] if middle else [])})
        for field, values in choices.items()
        if field in fields
    }


def save(table: LatencyTable, path: str | Path) -> None:
    """Write `latency.json`, replacing one that is there."""
    replace_json(Path(path), table.model_dump())


def load(path: str | Path, layout: Layout) -> LatencyTable:
    """Read `latency.json` and hold it against a parent.

    Raises:
        CheckpointError: unreadable, malformed, or of another model: naming file and field.
    """
    values = read_json(Path(path))
    try:
        table = LatencyTable.model_validate(values)
        table.check(layout)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        reason = first["msg"].removeprefix("Value error, ")
        raise CheckpointError(f"{path}: {where + ': ' if where else ''}{reason}") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return table


def device_name(device: torch.device) -> str:
    """What the vendor calls an accelerator; of a CPU its kind and the threads torch uses."""
    if device.type == "cpu":
        return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    name = getattr(torch.get_device_module(device), "get_device_name", None)
    return name(device) if name else device.type


def _points(grid: Mapping[str, Sequence[int]]) -> Iterator[dict[str, int]]:
    """Every combination, the last axis fastest."""
    combinations = list(itertools.islice(itertools.product(*grid.values()), MOST_POINTS + 1))
    if not grid or not combinations:
        raise ValueError("latency: no axis to time, or an axis without choices")
    if len(combinations) > MOST_POINTS:
        longest = sorted(grid, key=lambda field: -len(grid[field]))
        named = ", ".join(f"{field} ({len(grid[field])} choices)" for field in longest[:3])
        raise ValueError(f"latency: a grid of more than {MOST_POINTS} points; thin {named}")
    return (dict(zip(grid, values, strict=True)) for values in combinations)


@torch.no_grad()
def _time(model: PreTrainedModel, mode: Mode, batch: int, context: int, calls: int = 3) -> list:
    """Milliseconds of some calls, after one that warms up."""
    run = _prefill(model, batch, context)
    if mode == "decode":
        run = _decode(model, batch, run().past_key_values)
    run()
    times = []
    for _ in range(calls):
        _synchronize(model.device)
        start = time.perf_counter()
        run()
        _synchronize(model.device)
        times.append(1000 * (time.perf_counter() - start))
    return times


def _prefill(model: PreTrainedModel, batch: int, context: int) -> Callable[[], Any]:
    ids = torch.ones(batch, context, dtype=torch.long, device=model.device)
    return lambda: model(input_ids=ids, use_cache=True, logits_to_keep=1)


def _decode(model: PreTrainedModel, batch: int, cache: Any) -> Callable[[], Any]:
    ids = torch.ones(batch, 1, dtype=torch.long, device=model.device)
    return lambda: model(input_ids=ids, past_key_values=cache, use_cache=True)


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
