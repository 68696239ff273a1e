"""Claims of quality at demo scale: the worth of joint training, stages, axes, ranking, routing.

Every experiment trains on as many tokens (T) and is measured on the same held-out problems; each
is repeated for several seeds (data order, draws of sizes, fresh weights, calibration sample).

    python -m bench.quality run --out runs/quality --seeds 3 --steps 300
    python -m bench.quality report --out runs/quality      # the tables of docs/results.md

Finished runs are lines of `results-*.jsonl` and are not repeated; `--worker 0/2` takes every other.
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from bench.quality_report import tables
from demo.data import data_files
from star_elastic import stock
from star_elastic.between import interpolate
from star_elastic.budget import Metric, choices
from star_elastic.evaluate import evaluate_size, mean
from star_elastic.model import ElasticModel
from star_elastic.records import Record, read_records
from star_elastic.search import calibration_loss, search
from star_elastic.submodel import Fields
from star_elastic.symbols import DEPTH
from star_elastic.train.baselines import train_alone
from star_elastic.train.recipe import Recipe, load_recipe
from star_elastic.train.run import train
from star_elastic.train.sizes import by_fraction
from star_elastic.train.sort import sorted_parent

EXPERIMENTS = (
    *("nested", "single-middle", "single-small", "alone-full", "alone-middle", "alone-small"),
    *("one-stage", "two-stage", "depth", "width", "random", "router", "search", "between"),
)
SHARES = {"full": 1.0, "middle": 0.7, "small": 0.4}  # of the parent's active parameters
AXES = {  # what the router and the search may choose among
    "hidden_size": [64, 80, 96, 112, 128],
    "moe_intermediate_size": [24, 32, 40, 48, 56, 64],
    "moe_shared_expert_intermediate_size": [48, 64, 80, 96, 112, 128],
    "mamba_num_heads": [4, 6, 8],
    "n_routed_experts": [4, 6, 8],
}
BETWEEN = [0.42, 0.47, 0.51, 0.55, 0.6, 0.65, 0.75, 0.8, 0.87, 0.95]


class Bench:
    """The experiments of one seed in a folder."""

    def __init__(self, out: Path, seed: int, steps: int, heldout: list[Record]):
        self.out = out
        self.seed = seed
        self.steps = steps
        self.heldout = heldout

    def recipe(self, *overrides: str) -> Recipe:
        """The demo's recipe for this seed, T tokens long."""
        data = self.out / "data"
        known = [f"data.train={data / 'train.jsonl'}", f"data.heldout={data / 'heldout.jsonl'}"]
        known += [f"train.seed={self.seed}", f"train.stages.0.steps={self.steps}"]
        known += ["train.save_every=100000", "train.between=0"]
        return load_recipe("recipes/demo.yaml", [*known, *overrides])

    def rows(self, experiment: str) -> Iterator[dict[str, Any]]:
        """Run one experiment; a row per size measured."""
        kind, _, size = experiment.partition("-")
        if kind == "alone":
            yield from self.alone(size)
        elif kind == "single":
            probs = json.dumps({size: 1.0})
            yield from self.trained(f"train.stages.0.size_probs={probs}", only=[size])
        elif kind in ("depth", "width"):
            yield from self.thinner(kind)
        elif kind == "search":
            yield from self.searched()
        else:
            yield from self.trained(*_OVERRIDES[experiment](self.steps))

    def trained(self, *overrides: str, only: list[str] | None = None) -> Iterator[dict[str, Any]]:
        """A run of the recipe: its named sizes, and sizes between them that nobody trained."""
        recipe = self.recipe(*overrides)
        folder = Path(tempfile.mkdtemp(dir=self.out))
        model = ElasticModel.from_pretrained(train(recipe, folder))
        for name, size in model.sizes.items():
            if only is None or name in only:
                yield self.measured(model, name, size.config)
        if not overrides or "train.between" in overrides[0]:
            yield from self.between(model)
        if not overrides:
            untrained = ElasticModel.from_pretrained(folder / "sorted")
            for name, size in untrained.sizes.items():
                yield self.measured(untrained, f"sorted {name}", size.config, generate=False)
        shutil.rmtree(folder)

    def between(self, model: ElasticModel) -> Iterator[dict[str, Any]]:
        """Interpolated sizes over the whole range."""
        sizes = {name: size.config for name, size in model.sizes.items()}
        metric = Metric(kind="active")
        multiple: dict[str, int] = {"hidden_size": 8, "moe_intermediate_size": 8}
        for share in BETWEEN:
            budget = share * model.layout.count_active()
            fields = interpolate(model.layout, sizes, metric, budget, multiple)
            yield self.measured(model, f"between {share}", fields)

    def alone(self, size: str) -> Iterator[dict[str, Any]]:
        """One size from random weights, by cross-entropy, on T tokens of its own."""
        recipe = self.recipe()
        parent = ElasticModel.from_pretrained(str(recipe.parent))
        fields = by_fraction(parent.layout, SHARES[size], recipe.multiple_of)
        yield self.measured(train_alone(recipe, fields), size, {})

    def thinner(self, kind: str) -> Iterator[dict[str, Any]]:
        """About 15 % fewer parameters in width or in depth, distilled alone on T tokens.

        Depth goes in whole layers: it sets the count, and width meets it.
        """
        nothing = "train.stages.0.size_probs=null"
        recipe = self.recipe("rank.depth=true", f"sizes={json.dumps({'full': {}})}", nothing)
        layout = ElasticModel.from_pretrained(str(recipe.parent)).layout
        ranked = sorted_parent(recipe).layout
        target = 0.85 * layout.count()
        depths = range(2, len(layout.blocks))
        deep = min(depths, key=lambda k: abs(ranked.count(ranked.sizes_of({DEPTH: k})) - target))
        fields: Fields = {DEPTH: deep}
        if kind == "width":
            target = ranked.count(ranked.sizes_of(fields))
            widths = [by_fraction(layout, n / 1000, {}) for n in range(700, 990, 5)]
            count = lambda w: layout.count(layout.sizes_of(w))  # noqa: E731
            fields = min(widths, key=lambda w: abs(count(w) - target))
        sizes = {"full": {}, kind: dict(fields)}
        yield from self.trained(
            "rank.depth=true",
            f"sizes={json.dumps(sizes)}",
            f"train.stages.0.size_probs={json.dumps({kind: 1.0})}",
            only=[kind],
        )

    def searched(self) -> Iterator[dict[str, Any]]:
        """Sizes found by calibration loss on the sorted parent, then trained jointly."""
        model = sorted_parent(self.recipe())
        records = read_records(self.out / "data" / "train.jsonl")[:64]
        loss = calibration_loss(model, records)
        budgets = {n: s * model.layout.count_active() for n, s in SHARES.items() if s < 1}
        offered = choices(model.layout, AXES, {})
        wanted = {axis: [v for v in AXES[axis] if v in offered[axis]] for axis in AXES}
        found = search(model.layout, wanted, Metric(kind="active"), list(budgets.values()), loss)
        sizes: dict[str, Any] = {"full": {}}
        sizes |= {name: found[budget].fields for name, budget in budgets.items()}
        yield from self.trained(f"sizes={json.dumps(sizes)}")

    def measured(
        self, model: ElasticModel, size: str, fields: Fields, generate: bool = True
    ) -> dict[str, Any]:
        """Held-out loss and accuracy of one size."""
        view = model.submodel(**fields)
        quality = evaluate_size(view, model.tokenizer, self.heldout, 256, 128, generate)
        sizes = model.layout.sizes_of(fields)
        return {
            "size": size,
            "fields": dict(fields),
            "total": model.layout.count(sizes),
            "active": model.layout.count_active(sizes),
            "nll": mean(quality, "nll"),
            "accuracy": mean(quality),
        }


def _two_stage(steps: int) -> list[str]:
    """Short rows and a uniform draw, then longer rows and half of the draws at the full size."""
    later = int(0.4 * steps)
    stage = {"sequence_length": 256, "rows": 8, "accumulate": 2, "min_lr_ratio": 0.05}
    stages = [
        {**stage, "steps": steps - later, "learning_rate": 1.5e-3, "warmup_steps": 30}
        | {"min_lr_ratio": 0.3},
        {**stage, "steps": later, "learning_rate": 4.5e-4, "warmup_steps": 0}
        | {"sequence_length": 512, "rows": 4, "min_lr_ratio": 0.15}
        | {"size_probs": {"full": 0.5, "middle": 0.3, "small": 0.2}},
    ]
    return [f"train.stages={json.dumps(stages)}"]


_OVERRIDES: Mapping[str, Any] = {
    "nested": lambda steps: [],
    "one-stage": lambda steps: ["train.stages.0.size_probs=null"],
    "two-stage": _two_stage,
    "between": lambda steps: ["train.between=0.4"],
    "random": lambda steps: ["rank.order=random"],
    "router": lambda steps: [
        f"router={json.dumps({'axes': AXES, 'metric': 'active', 'every': 4, 'until': 0.5})}"
    ],
}


def run(out: Path, seeds: int, steps: int, worker: str, only: list[str]) -> None:
    """All experiments that no results file has yet."""
    number, _, workers = worker.partition("/")
    stock.quiet()
    torch.set_num_threads(1)
    if not (out / "data" / "heldout.jsonl").exists():
        data_files(None, out, 30_000, 300)
    heldout = read_records(out / "data" / "heldout.jsonl")
    jobs = [(seed, experiment) for seed in range(seeds) for experiment in only or EXPERIMENTS]
    for place, (seed, experiment) in enumerate(jobs):
        if place % int(workers) != int(number) or (seed, experiment) in _done(out):
            continue
        bench = Bench(out, seed, steps, heldout)
        rows = list(bench.rows(experiment))
        with (out / f"results-{number}.jsonl").open("a", encoding="utf-8") as lines:
            for row in rows:
                known = {"experiment": experiment, "seed": seed, "steps": steps}
                lines.write(json.dumps({**known, **row}) + "\n")
        print(experiment, seed, [(r["size"], r["accuracy"]) for r in rows], flush=True)


def _done(out: Path) -> set[tuple[int, str]]:
    return {(row["seed"], row["experiment"]) for row in results(out)}


def results(out: Path) -> list[dict[str, Any]]:
    """Every row measured so far."""
    return [
        json.loads(line)
        for path in sorted(out.glob("results-*.jsonl"))
        for line in path.read_text("utf-8").splitlines()
    ]


def main() -> None:
    """Run experiments, or print their tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["run", "report"])
    parser.add_argument("--out", type=Path, default=Path("runs/quality"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--worker", default="0/1")
    parser.add_argument("--only", nargs="*", default=[], choices=EXPERIMENTS)
    arguments = parser.parse_args()
    if arguments.what == "report":
        print(tables(results(arguments.out)))
    else:
        run(arguments.out, arguments.seeds, arguments.steps, arguments.worker, arguments.only)


if __name__ == "__main__":
    main()
