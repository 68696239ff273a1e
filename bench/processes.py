"""Claim: two processes with FSDP2 train exactly what one does; and how fast they are.

The same recipe runs in one process with one thread, with two threads, and under torchrun as two
processes of one thread each, at one global batch.

    python -m bench.processes --out runs/processes --steps 30
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from demo.data import data_files
from star_elastic.checkpoint import Checkpoint


def run(out: Path, name: str, steps: int, processes: int, threads: int) -> list[dict[str, Any]]:
    """Train in `out/name`; the lines of its metrics."""
    folder = out / name
    shutil.rmtree(folder, ignore_errors=True)
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone"]
        launch += ["--nproc-per-node", str(processes)]
    words = ["-m", "star_elastic", "train", "recipes/demo.yaml", "--out", str(folder)]
    changes = [
        f"data.train={out / 'data/train.jsonl'}",
        f"data.heldout={out / 'data/heldout.jsonl'}",
    ]
    changes += [f"train.stages.0.steps={steps}", "train.same_size=2"]
    changes += ["train.stages.0.accumulate=4", "train.stages.0.rows=4"]
    words += [word for change in changes for word in ("--set", change)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    subprocess.run([*launch, *words], check=True, env=environment, capture_output=True)
    return [json.loads(line) for line in (folder / "metrics.jsonl").open(encoding="utf-8")]


def seconds(lines: list[dict[str, Any]]) -> float:
    """Median seconds of a step, the first few left out."""
    times = [line["seconds"] for line in lines]
    return median(b - a for a, b in zip(times[3:], times[4:], strict=False))


def difference(one: list[dict[str, Any]], two: list[dict[str, Any]]) -> float:
    """The largest relative difference of any loss at any step."""
    worst = 0.0
    for a, b in zip(one, two, strict=True):
        assert a["losses"].keys() == b["losses"].keys() and a["tokens"] == b["tokens"]
        for name, loss in a["losses"].items():
            worst = max(worst, abs(loss - b["losses"][name]) / max(abs(loss), 1e-6))
    return worst


def weights_differ(out: Path, one: str, two: str) -> float:
    """The largest difference of any weight at the end."""
    folders = (dict(Checkpoint.open(out / name / "elastic").tensors()) for name in (one, two))
    a, b = folders
    return max((a[name] - b[name]).abs().max().item() for name in a)


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/processes"))
    parser.add_argument("--steps", type=int, default=30)
    arguments = parser.parse_args()
    data_files(None, arguments.out, 3000, 30)
    out, steps = arguments.out, arguments.steps
    runs = {
        "one process, one thread": run(out, "one", steps, 1, 1),
        "one process, two threads": run(out, "threads", steps, 1, 2),
        "two processes, one thread each": run(out, "two", steps, 2, 1),
    }
    first, _, both = runs.values()
    figures = {
        "seconds": {name: seconds(lines) for name, lines in runs.items()},
        "largest_relative_loss_difference": difference(first, both),
        "largest_weight_difference": weights_differ(out, "one", "two"),
    }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
