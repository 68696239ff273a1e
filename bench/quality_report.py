"""The tables of `bench.quality`: mean and spread over seeds."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import mean, stdev
from typing import Any

Rows = Sequence[dict[str, Any]]


def tables(rows: Rows) -> str:
    """Markdown: every experiment and size, then the curve of sizes nobody trained."""
    parts = [_table([row for row in rows if not row["size"].startswith("between")])]
    for experiment in ("nested", "between"):
        curve = [row for row in rows if row["experiment"] == experiment]
        if curve := [row for row in curve if "sorted" not in row["size"]]:
            parts.append(f"{experiment}:\n\n{_curve(curve)}")
    return "\n\n".join(parts)


def _grouped(rows: Iterable[dict[str, Any]], *keys: str) -> dict[tuple[Any, ...], Rows]:
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[tuple(row[key] for key in keys)].append(row)
    return dict(groups)


def _table(rows: Rows) -> str:
    lines = ["| run | size | total | active | seeds | accuracy | NLL |", "|" + " --- |" * 7]
    for (experiment, size), found in _grouped(rows, "experiment", "size").items():
        total, active = (round(mean(row[key] for row in found)) for key in ("total", "active"))
        lines.append(
            f"| {experiment} | {size} | {total:,} | {active:,} | {len(found)} | "
            f"{_accuracy(found)} | "
            f"{_spread([row['nll'] for row in found], 4)} |"
        )
    return "\n".join(lines)


def _curve(rows: Rows) -> str:
    """Sizes by active parameters: trained ones by name, others against the line between those."""
    lines = ["| active | trained | accuracy | NLL | NLL on the line |", "|" + " --- |" * 5]
    points = []
    for found in _grouped(rows, "active").values():
        found = [group[0] for group in _grouped(found, "seed").values()]  # budgets may share a size
        values = (mean(row[key] for row in found) for key in ("active", "accuracy", "nll"))
        points.append((*values, found[0]["size"], found))
    points.sort(key=lambda point: point[0])
    for active, _, _, size, found in points:
        trained = "" if size.startswith("between") else size
        line = "" if trained else f"{_on_the_line(points, active):.4f}"
        accuracy = _accuracy(found)
        nll = _spread([row["nll"] for row in found], 4)
        lines.append(f"| {active:,.0f} | {trained} | {accuracy} | {nll} | {line} |")
    return "\n".join(lines)


def _on_the_line(points: Sequence[tuple[Any, ...]], active: float) -> float:
    """The NLL of a straight line between the trained neighbours."""
    trained = [(p[0], p[2]) for p in points if not p[3].startswith("between")]
    below = max((p for p in trained if p[0] <= active), default=trained[0])
    above = min((p for p in trained if p[0] >= active), default=trained[-1])
    share = 0.0 if above[0] == below[0] else (active - below[0]) / (above[0] - below[0])
    return below[1] + share * (above[1] - below[1])


def _accuracy(rows: Rows) -> str:
    values = [100 * row["accuracy"] for row in rows if row["accuracy"] is not None]
    return f"{_spread(values, 1)} %" if values else ""


def _spread(values: Sequence[float], digits: int) -> str:
    middle = f"{mean(values):.{digits}f}"
    return f"{middle} ± {stdev(values):.{digits}f}" if len(values) > 1 else middle
