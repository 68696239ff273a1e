"""The table of sizes that several verbs print, for people or (`--json`) for programs."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from star_elastic.checkpoint import Checkpoint
    from star_elastic.submodel import Submodel


def size_rows(checkpoint: "Checkpoint") -> list[dict[str, Any]]:
    """One object a size: counts, bytes, state and measured quality."""
    return [size_row(checkpoint, size) for size in checkpoint.space.submodels]


def size_row(checkpoint: "Checkpoint", size: "Submodel") -> dict[str, Any]:
    """One size of a checkpoint, declared there or not; see `size_rows`."""
    child = checkpoint.layout.sizes_of(size.config)
    return {
        "name": size.name,
        "config": size.config,
        "total_params": size.total_params,
        "active_params": size.active_params,
        "disk_bytes": checkpoint.disk_bytes(child),
        "resident_bytes": checkpoint.resident_bytes(child),
        "cache_bytes_per_token": checkpoint.cache_bytes_per_token(child),
        "trained": size.trained,
        "quality": size.quality,
    }


def print_sizes(rows: Sequence[dict[str, Any]], as_json: bool) -> None:
    """Print rows of `size_rows`."""
    if as_json:
        print(json.dumps(list(rows), indent=2))
        return
    table = Table()
    for head in ("size", "total", "active", "on disk", "resident", "cache/token", "trained"):
        side = "left" if head in ("size", "trained") else "right"
        table.add_column(head, justify=side, overflow="fold")  # a digit cut off is a lie
    for row in rows:
        table.add_row(
            row["name"],
            f"{row['total_params']:,}",
            f"{row['active_params']:,}",
            readable(row["disk_bytes"]),
            readable(row["resident_bytes"]),
            readable(row["cache_bytes_per_token"]),
            "yes" if row["trained"] else "[red]no[/red]",
        )
    console = Console()
    console.print(table)
    measured = [row for row in rows if row["quality"]]
    for row in rows:
        for baseline, quality in row.get("baselines", {}).items():
            measured.append({"name": f"{row['name']}, {baseline}", "quality": quality})
    if measured:
        console.print(_quality_table(measured))


def _quality_table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table("size")
    tasks = sorted({task for row in rows for task in row["quality"]})
    for task in tasks:
        table.add_column(f"{task}, accuracy / nll", justify="right")
    for row in rows:
        table.add_row(row["name"], *(_quality(row["quality"].get(task, {})) for task in tasks))
    return table


def _quality(measured: dict[str, float]) -> str:
    accuracy, nll = measured.get("accuracy"), measured.get("nll")
    left = "-" if accuracy is None else f"{100 * accuracy:.1f} %"
    return f"{left} / " + ("-" if nll is None else f"{nll:.3f}")


def readable(size: float) -> str:
    """Bytes for people: 1.5 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
