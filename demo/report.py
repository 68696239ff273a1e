"""`report.md`, `report.json` and the pictures of one run of the line."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt

from star_elastic.card import size_table
from star_elastic.evaluate import Quality, mean
from star_elastic.submodel import ElasticSpace

_SERIES = (
    ("elastic", "trained jointly", "o-", "#1a7f37"),
    ("alone", "trained alone, same tokens", "s--", "#0969da"),
    ("sorted", "sorted, untrained", "x:", "#cf222e"),
)


def write(out: Path, figures: dict[str, Any]) -> None:
    """Write the report of a run into its folder."""
    matplotlib.use("Agg")
    figures["bars"] = bars(figures)
    (out / "report.json").write_text(json.dumps(figures, indent=2) + "\n", "utf-8")
    _training_picture(out)
    _quality_picture(out, figures)
    sections = [_title(figures), _sizes(out), _quality(figures), _bars(figures), _costs(figures)]
    (out / "report.md").write_text("\n".join(line for part in sections for line in part), "utf-8")


def bars(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What this run is held to, the figure reached, and whether it suffices."""
    rows = [
        _bar("all sizes resident / parent bytes", figures["resident"]["ratio"], "<=", 1.01),
        _bar("seconds to make a size", figures["new_size_seconds"], "<", 0.05),
        _bar("step at a size / alone", figures["step_cost"]["narrowed_over_alone"], "<=", 1.10),
        _bar(
            "slice against view, largest difference",
            max((s["max_difference_to_view"] for s in figures["slices"].values()), default=0.0),
            "<=",
            0.0,
        ),
    ]
    parent = mean(figures["parent"])
    if parent is None or not figures["is_demo"]:
        return rows
    middle, small = (mean(figures["elastic"][name]) for name in ("middle", "small"))
    untrained = mean(figures["sorted"]["small"])
    assert middle is not None and small is not None and untrained is not None
    mathematics = figures["parent"]["mathematics"]["accuracy"]
    seconds = figures["seconds"]["whole line"] - figures["seconds"].get("baselines", 0)
    return [
        _bar("parent, mathematics", mathematics, ">=", 0.90),
        _bar("middle / parent, mean accuracy", middle / parent, ">=", 0.97),
        _bar("small / parent, mean accuracy", small / parent, ">=", 0.90),
        _bar("small, trained minus merely sorted", small - untrained, ">=", 0.20),
        _bar("minutes, the line without baselines", seconds / 60, "<=", 8),
        _bar("peak memory, GiB", figures["peak_memory_bytes"] / 2**30, "<=", 4),
        *rows,
    ]


def _bar(name: str, figure: float, relation: str, bound: float) -> dict[str, Any]:
    met = {"<=": figure <= bound, "<": figure < bound, ">=": figure >= bound}[relation]
    return {"name": name, "figure": figure, "bar": f"{relation} {bound:g}", "met": met}


def _title(figures: Mapping[str, Any]) -> list[str]:
    seconds = figures["seconds"]
    stages = ", ".join(f"{stage} {value:.0f} s" for stage, value in seconds.items())
    return [
        "# One checkpoint, every size",
        "",
        f"Recipe `{figures['recipe']}`: {figures['steps']} steps, {figures['tokens']:,} tokens, "
        "all sizes in one run, distilled from the frozen parent.",
        "",
        f"Wall time: {stages}. Peak memory {figures['peak_memory_bytes'] / 2**30:.2f} GiB.",
        "",
    ]


def _sizes(out: Path) -> list[str]:
    declared = json.loads((out / "elastic" / "config.json").read_text("utf-8"))["elastic_config"]
    sizes = ElasticSpace.model_validate(declared).submodels
    return ["## Sizes in `elastic/`", "", *size_table(sizes), ""]


def _quality(figures: Mapping[str, Any]) -> list[str]:
    tasks = sorted(figures["parent"])
    head = ["", "size", *(f"{task} acc." for task in tasks), "mean acc.", "mean NLL"]
    rows = [("the parent as it came", "full", figures["parent"])]
    for key, label, *_ in _SERIES:
        rows += [(label, size, quality) for size, quality in figures.get(key, {}).items()]
    table = [
        [
            label,
            size,
            *(_percent(quality[task].get("accuracy")) for task in tasks),
            _percent(mean(quality)),
            f"{mean(quality, 'nll'):.4f}",
        ]
        for label, size, quality in rows
    ]
    return [
        "## Held-out quality",
        "",
        *_table([head, *table]),
        "",
        "NLL is the mean loss of completion tokens in nats. Accuracy is greedy and exact.",
        "",
        "![quality by active parameters](quality.png)",
        "![training](training.png)",
        "",
    ]


def _bars(figures: Mapping[str, Any]) -> list[str]:
    rows = [["what", "figure", "bar", "met"]]
    for bar in figures["bars"]:
        met = "yes" if bar["met"] else "**no**"
        rows.append([bar["name"], f"{bar['figure']:.4g}", bar["bar"], met])
    missed = [bar for bar in figures["bars"] if not bar["met"]]
    causes = [f"- {bar['name']} reached {bar['figure']:.4g}: {_cause(bar)}" for bar in missed]
    return ["## Bars", "", *_table(rows), "", *causes, ""]


def _cause(bar: Mapping[str, Any]) -> str:
    if "minutes" in bar["name"] or "seconds" in bar["name"] or "alone" in bar["name"]:
        return "a time, measured on this machine as it was loaded at that moment."
    return "more steps or a wider small size would close it; this recipe is cut to minutes."


def _costs(figures: Mapping[str, Any]) -> list[str]:
    cost, resident = figures["step_cost"], figures["resident"]
    return [
        "## Costs",
        "",
        f"- All sizes in memory: {resident['all_sizes_bytes']:,} bytes, "
        f"{resident['ratio']:.4f} x the parent's {resident['parent_bytes']:,}.",
        f"- Making a new size from the loaded parent: {figures['new_size_seconds'] * 1e3:.1f} ms.",
        f"- One training step at the smallest size: {cost['narrowed_seconds'] * 1e3:.0f} ms in the "
        f"parent's weights, {cost['alone_seconds'] * 1e3:.0f} ms as a model of its own "
        f"({cost['narrowed_over_alone']:.2f} x). Masking the whole parent instead would have cost "
        f"{cost['masked_seconds'] * 1e3:.0f} ms ({cost['masked_over_alone']:.2f} x).",
        "",
    ]


def _training_picture(out: Path) -> None:
    """Loss per size over steps, from the run's own metrics."""
    losses: dict[str, list[tuple[int, float]]] = {}
    with (out / "metrics.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            step = json.loads(line)
            for size, loss in step["losses"].items():
                losses.setdefault(size, []).append((step["step"], loss))
    picture, axes = plt.subplots(figsize=(6, 3.5))
    for size, points in losses.items():
        axes.plot(*zip(*_smoothed(points), strict=True), label=size)
    axes.set(xlabel="step", ylabel="KL to the parent, nats", yscale="log")
    axes.legend()
    _save(picture, out / "training.png")


def _quality_picture(out: Path, figures: Mapping[str, Any]) -> None:
    """Mean accuracy (or loss) by active parameters, jointly trained against the baselines."""
    metric = "accuracy" if mean(figures["parent"]) is not None else "nll"
    active = {row["name"]: row["active_params"] for row in figures["sizes"]}
    picture, axes = plt.subplots(figsize=(6, 3.5))
    for key, label, style, color in _SERIES:
        points = sorted((active[n], _value(q, metric)) for n, q in figures.get(key, {}).items())
        if points:
            axes.plot(*zip(*points, strict=True), style, color=color, label=label)
    axes.axhline(_value(figures["parent"], metric), color="grey", lw=0.8, label="parent")
    axes.set(xlabel="active parameters", ylabel=f"held-out {metric}, mean over tasks")
    axes.legend()
    _save(picture, out / "quality.png")


def _value(quality: Quality, metric: str) -> float:
    value = mean(quality, metric)
    assert value is not None
    return value


def _smoothed(points: Iterable[tuple[int, float]]) -> list[tuple[int, float]]:
    smooth: list[tuple[int, float]] = []
    for step, loss in points:
        before = smooth[-1][1] if smooth else loss
        smooth.append((step, 0.9 * before + 0.1 * loss))
    return smooth


def _save(picture: Any, path: Path) -> None:
    picture.tight_layout()
    picture.savefig(path, dpi=120)
    plt.close(picture)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]]
