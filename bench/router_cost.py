"""Claim: a router and N sizes cost at most 5 % over plain distillation at the same mean size.

Plain distillation trains one size whose active parameters are the mean of the N sizes'. Steps are
taken in turn, in blocks; a run's time per micro-batch is the mean of each size's median, weighted
as sizes are drawn, the router's micro-batches with their share. Peak memory is that of a process
of its own per run.

    python -m bench.router_cost demo/parent --device cpu
"""

import argparse
import json
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

from bench.step_cost import Fixed, fixed_batch
from star_elastic import stock
from star_elastic.budget import Metric
from star_elastic.model import ElasticModel
from star_elastic.submodel import Fields
from star_elastic.train.distributed import World
from star_elastic.train.parts import Parts
from star_elastic.train.recipe import Optimise, Routing, Stage
from star_elastic.train.router import Router, warm_up
from star_elastic.train.routing import RouterTraining
from star_elastic.train.sizes import by_fraction
from star_elastic.train.teacher import Teacher
from star_elastic.train.trainer import Trainer

SHARES = {  # all of the same mean
    1: [0.7],
    3: [1.0, 0.7, 0.4],
    8: [1.0, 0.91, 0.83, 0.74, 0.66, 0.57, 0.49, 0.4],
}
PLAIN = "plain"


def trainer(
    path: str,
    shares: list[float],
    every: int | None,
    rows: int,
    length: int,
    device: str,
    split: bool = False,
) -> Trainer:
    """A trainer of some sizes; with `every` it has a router that learns so often."""
    model, teacher = (ElasticModel.from_pretrained(path, device=device) for _ in range(2))
    layout = model.layout
    sizes: dict[str, Fields] = {f"{s}": by_fraction(layout, s, {}) for s in shares}
    parts = Parts(layout, model.state)
    routing = None
    if every is not None:
        widths = ("hidden_size", "moe_intermediate_size", "intermediate_size")
        axes = {
            axis: sorted({n * layout.sizes[axis] // 8 for n in (4, 5, 6, 7, 8)})
            for axis in widths
            if axis in layout.axes
        }
        settings = Routing(axes=axes, every=every, warmup=50)
        # its budgets are anchors only: the sizes stay those of plain distillation
        router = Router(layout, settings, Metric(kind="active"), [1.0, 0.7, 0.4])
        warm_up(router)
        routing = RouterTraining(router, parts, {"1.0": 1.0, "0.7": 0.7, "0.4": 0.4})
        routing.settle = lambda sizes: None  # type: ignore[method-assign]
    batch = fixed_batch(layout.sizes["vocab_size"], rows, length)
    streams: Any = lambda number: Fixed(batch)  # noqa: E731
    stage = Stage(steps=10**6, sequence_length=length, rows=rows)
    taught = Teacher(Parts(teacher.layout, teacher.state))
    here, settings = World(device=torch.device(device)), Optimise(stages=[stage], split=split)
    return Trainer(parts, sizes, settings, streams, taught, routing=routing, here=here)


def step_seconds(each: Trainer, seconds: Mapping[str, list[float]]) -> None:
    """Time one step, under the size that was drawn (or `router`)."""
    start = time.perf_counter()
    report = each.step()
    if each.here.device.type == "cuda":
        torch.cuda.synchronize()
    seconds[next(iter(report.sizes), "router")].append(time.perf_counter() - start)


def expected(seconds: Mapping[str, list[float]], every: int | None) -> float:
    """Seconds of a micro-batch: medians by size, each as often as it is drawn."""
    sizes = mean(median(values) for name, values in seconds.items() if name != "router")
    if every is None:
        return sizes
    return sizes * (1 - 1 / every) + median(seconds["router"]) / every


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds per micro-batch of every run, and their ratios to the plain one."""
    rows, length, device = arguments.rows, arguments.length, arguments.device
    runs = {PLAIN: trainer(arguments.model, [0.7], None, rows, length, device)}
    for count, shares in SHARES.items():
        runs[f"{count}"] = trainer(
            arguments.model, shares, arguments.every, rows, length, device, arguments.split
        )
    seconds: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in runs}
    for block in range(arguments.blocks):
        for name, each in runs.items():
            for _ in range(arguments.every):
                step_seconds(each, seconds[name] if block else defaultdict(list))
    found = {
        name: expected(times, None if name == PLAIN else arguments.every)
        for name, times in seconds.items()
    }
    return {
        "seconds": found,
        "over_plain": {name: value / found[PLAIN] for name, value in found.items()},
        "by_size": {n: {s: median(v) for s, v in t.items()} for n, t in seconds.items()},
    }


def peak(arguments: argparse.Namespace) -> dict[str, float]:
    """Peak memory of each run in a process of its own, above that of the loaded models."""
    found = {}
    for name in (PLAIN, "full", *map(str, SHARES)):
        words = [sys.executable, "-m", "bench.router_cost", arguments.model, "--only", name]
        words += ["--rows", str(arguments.rows), "--length", str(arguments.length)]
        words += ["--every", "3", "--device", arguments.device]
        words += ["--split"] if arguments.split else []
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        found[name] = json.loads(done.stdout)["peak_bytes"]
    return found


def one(arguments: argparse.Namespace) -> dict[str, float]:
    """Peak bytes of one run alone."""
    shares = {PLAIN: [0.7], "full": [1.0]}.get(arguments.only)
    every = None if shares else arguments.every
    shares = shares or SHARES[int(arguments.only)]
    rows, length, device = arguments.rows, arguments.length, arguments.device
    each = trainer(arguments.model, shares, every, rows, length, device, arguments.split)
    for _ in range(12):
        each.step()
    if arguments.device == "cuda":
        return {"peak_bytes": torch.cuda.max_memory_allocated()}
    return {"peak_bytes": _high_water()}


def _high_water() -> int:
    """Peak resident bytes of this program (`ru_maxrss` would count its parent's, before exec)."""
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--every", type=int, default=32)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--split", action="store_true", help="larger sizes in pieces of rows")
    parser.add_argument("--peak-only", action="store_true", help="memory, no times")
    parser.add_argument("--only", help="one run alone: its peak memory")
    arguments = parser.parse_args()
    stock.quiet()
    if arguments.only:
        print(json.dumps(one(arguments)))
        return
    figures = {} if arguments.peak_only else measure(arguments)
    figures["peak_bytes"] = peak(arguments)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
