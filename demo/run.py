"""The whole line on one machine: rank, reorder, train, save, slice, check, evaluate, report.

    python -m demo.run --recipe recipes/demo.yaml --out runs/demo
    python -m demo.run --recipe recipes/demo.yaml --out runs/mine --parent HUB_ID --data MY.jsonl

`--parent` and `--data` run the very same line on a model and records of your own.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from bench.sizes import new_size_seconds, resident
from bench.step_cost import step_cost
from demo import report
from demo.data import data_files
from star_elastic import stock
from star_elastic.checkpoint import Checkpoint, declare
from star_elastic.cli.progress import LiveLosses
from star_elastic.cli.table import print_sizes, size_rows
from star_elastic.evaluate import Quality, evaluate, with_quality
from star_elastic.model import ElasticModel
from star_elastic.records import Record, read_records
from star_elastic.slicing import slice_checkpoint
from star_elastic.train.baselines import train_alone
from star_elastic.train.recipe import Recipe, load_recipe
from star_elastic.train.run import train


class Line:
    """One run of the line: its folders, its recipe, and what it has measured so far."""

    def __init__(self, recipe: Recipe, out: Path, resume: bool, console: Console):
        self.recipe = recipe
        self.out = out
        self.resume = resume
        self.console = console
        self.figures: dict[str, Any] = {"recipe": recipe.name, "seconds": {}}

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Announce a stage and keep its wall time."""
        self.console.rule(stage)
        start = time.perf_counter()
        yield
        self.figures["seconds"][stage] = time.perf_counter() - start

    def run(self, baselines: bool) -> dict[str, Any]:
        """All stages in order; returns every figure."""
        with self.timed("train"):
            self.train()
        heldout = read_records(self.recipe.data.heldout)
        with self.timed("evaluate"):
            self.evaluate(heldout)
        with self.timed("slice and check"):
            self.slice()
        with self.timed("costs"):
            self.costs()
        if baselines:
            with self.timed("baselines"):
                self.baselines(heldout)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self.figures["peak_memory_bytes"] = peak
        self.figures["sizes"] = size_rows(Checkpoint.open(self.out / "elastic"))
        return self.figures

    def train(self) -> None:
        """Rank, reorder and train jointly; `out/elastic` and `out/sorted` appear."""
        live = LiveLosses(self.console, self.recipe.train.steps)
        with live.progress:
            train(self.recipe, self.out, self.resume, [live], live.progress.console.print)
        with (self.out / "metrics.jsonl").open(encoding="utf-8") as lines:
            last = [json.loads(line) for line in lines][-1]
        self.figures["tokens"] = last["tokens"]
        self.figures["steps"] = last["step"]

    def evaluate(self, heldout: Sequence[Record]) -> None:
        """The parent as it came, every trained size, and every size merely sorted and cut."""
        parent = ElasticModel.from_pretrained(str(self.recipe.parent))
        self.figures["parent"] = self._quality(parent, heldout)["full"]
        self.figures["elastic"] = self._quality(self._open("elastic"), heldout)
        self.figures["sorted"] = self._quality(self._open("sorted"), heldout)
        opened = Checkpoint.open(self.out / "elastic")
        declare(opened, with_quality(opened.space, self.figures["elastic"]))

    def slice(self) -> None:
        """Cut the smaller sizes to stock folders; stock transformers must agree to the last bit."""
        opened = Checkpoint.open(self.out / "elastic")
        folders = {n: self.out / "slices" / n for n, s in opened.space.sizes.items() if s.config}
        for name, folder in folders.items():
            slice_checkpoint(opened, folder, name, overwrite=True)
        model = self._open("elastic")
        generator = torch.Generator().manual_seed(0)
        vocabulary = model.layout.sizes["vocab_size"]
        input_ids = torch.randint(vocabulary, (2, 48), generator=generator)
        logits = self._stock_logits(input_ids, list(folders.values()))
        self.figures["slices"] = {}
        for name, folder in folders.items():
            with torch.no_grad():
                view = model[name](input_ids).logits
            difference = (view - logits[str(folder)]).abs().max().item()
            self.figures["slices"][name] = {"max_difference_to_view": difference}
            self.console.print(f"{folder}: largest difference to the view: {difference}")

    def costs(self) -> None:
        """Bytes of all sizes together, time to make a size, cost of a step at the smallest."""
        model = self._open("elastic")
        smallest = min(model.sizes.values(), key=lambda size: size.total_params)
        self.figures["resident"] = resident(model)
        self.figures["new_size_seconds"] = max(new_size_seconds(model).values())
        self.figures["step_cost"] = step_cost(model, smallest.name, repeats=7)

    def baselines(self, heldout: Sequence[Record]) -> None:
        """Each size trained alone from random weights on as many tokens as the elastic run."""
        self.figures["alone"] = {}
        for name, size in self._open("elastic").sizes.items():
            live = LiveLosses(self.console, self.recipe.train.steps)
            with live.progress:
                model = train_alone(self.recipe, size.config, [live])
            self.figures["alone"][name] = self._quality(model, heldout)["full"]

    def _open(self, folder: str) -> ElasticModel:
        return ElasticModel.from_pretrained(self.out / folder)

    def _quality(self, model: ElasticModel, heldout: Sequence[Record]) -> dict[str, Quality]:
        length = max(stage.sequence_length for stage in self.recipe.train.stages)
        return evaluate(model, heldout, max_length=length, max_new_tokens=min(length, 128))

    def _stock_logits(
        self, input_ids: torch.Tensor, folders: Sequence[Path]
    ) -> dict[str, torch.Tensor]:
        ids, out = self.out / "ids.safetensors", self.out / "logits.safetensors"
        save_file({"input_ids": input_ids}, ids)
        script = Path(__file__).with_name("stock_logits.py")
        subprocess.run([sys.executable, script, ids, out, *folders], check=True)
        logits = load_file(out)
        ids.unlink()
        out.unlink()
        return logits


def main() -> None:
    """Run the line and write `report.md` and `report.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", type=Path, default=Path("recipes/demo.yaml"))
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--parent", help="a model folder or hub id of your own")
    parser.add_argument("--data", type=Path, help="records of your own, JSONL")
    parser.add_argument("--baselines", action="store_true", help="train each size alone too")
    parser.add_argument("--resume", action="store_true", help="go on with a stopped run")
    parser.add_argument("--train-records", type=int, default=30_000, help="problems to generate")
    parser.add_argument("--heldout-records", type=int, default=600)
    parser.add_argument("--set", action="append", default=[], help="override a recipe key")
    arguments = parser.parse_args()
    start = time.perf_counter()
    console = Console()
    stock.quiet()
    if not arguments.resume:
        shutil.rmtree(arguments.out, ignore_errors=True)
    train_path, heldout_path = data_files(
        arguments.data, arguments.out, arguments.train_records, arguments.heldout_records
    )
    overrides = [*arguments.set, f"data.train={train_path}", f"data.heldout={heldout_path}"]
    if arguments.parent:
        overrides.append(f"parent={arguments.parent}")
    recipe = load_recipe(arguments.recipe, overrides)
    line = Line(recipe, arguments.out, arguments.resume, console)
    try:
        figures = line.run(arguments.baselines)
    except KeyboardInterrupt:
        sys.exit("\nstopped; the same command with --resume goes on")
    figures["seconds"]["whole line"] = time.perf_counter() - start
    figures["is_demo"] = arguments.data is None and arguments.parent is None
    report.write(arguments.out, figures)
    print_sizes(figures["sizes"], as_json=False)
    console.print(f"report: {arguments.out / 'report.md'}")


if __name__ == "__main__":
    main()
