"""Claims: of each size's own accuracy FP8 keeps 98.5 %, NVFP4 after QAD 97 %; INT4 and INT8 told.

    python -m bench.recovery CKPT --data heldout.jsonl                  right after `quantize`
    python -m bench.recovery CKPT --data heldout.jsonl --train train.jsonl --after nvfp4,int4

CKPT is an elastic checkpoint, say `runs/demo/elastic`. Each format is measured at every size on the
numbers that its codes stand for (exactly those of the files, `tests/test_qad.py`); then, for the
formats after `--after`, the recipe teaches the parent its codes, and all is measured again. `--nll`
generates nothing: for text without answers (GSM8K at this scale) the loss is all there is to see.
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from star_elastic import stock
from star_elastic.evaluate import evaluate, mean
from star_elastic.model import ElasticModel
from star_elastic.precision import Format, format_of, quantized
from star_elastic.precision.fake import fake
from star_elastic.records import Record, read_records
from star_elastic.train.recipe import load_recipe
from star_elastic.train.run import train

FORMATS = "fp8,nvfp4,int8,int4"
BARS = {("fp8", "quantize"): 0.985, ("nvfp4", "QAD"): 0.97}  # of each size's own accuracy
Row = dict[str, Any]


@torch.no_grad()
def encode(model: ElasticModel, form: Format) -> ElasticModel:
    """The same model, its matrices replaced by what their codes stand for; in place."""
    state = model.state
    for weight in quantized(model.layout).values():
        matrix = model.layout.view(state, weight)
        matrix.copy_(fake(matrix, form))
    return model


class Bench:
    """One checkpoint and what its sizes are worth before."""

    def __init__(self, path: Path, records: Sequence[Record], settings: dict[str, Any]):
        self.path = path
        self.records = records
        self.settings = settings
        self.before: dict[str, Row] = {}

    def rows(self, formats: Sequence[str], group: int) -> Iterator[Row]:
        """Every size as it is, then as codes right after `quantize`."""
        for row in self.measured(ElasticModel.from_pretrained(self.path), "none", "none"):
            self.before[row["size"]] = row
            yield row
        for name in formats:
            model = encode(ElasticModel.from_pretrained(self.path), form_of(name, group))
            yield from self.measured(model, name, "quantize")

    def after(self, name: str, group: int, recipe: Path, overrides: Sequence[str]) -> Iterator[Row]:
        """Every size as codes, after the recipe taught the parent."""
        form: dict[str, Any] = {"format": name}
        if name == "int4":
            form["group"] = group
        for key, value in form.items():
            overrides = [*overrides, f"quantize.{key}={value}"]
        folder = Path(tempfile.mkdtemp())
        try:
            plan = load_recipe(recipe, [f"parent={self.path}", *overrides])
            model = ElasticModel.from_pretrained(train(plan, folder))
        finally:
            shutil.rmtree(folder)
        yield from self.measured(encode(model, form_of(name, group)), name, "QAD")

    def measured(self, model: ElasticModel, name: str, how: str) -> Iterator[Row]:
        """Accuracy and loss per size, and the share of its own accuracy that it kept."""
        for size, quality in evaluate(model, self.records, **self.settings).items():
            row: Row = {"format": name, "after": how, "size": size}
            row |= {"nll": mean(quality, "nll"), "accuracy": mean(quality)}
            own = self.before.get(size, row)["accuracy"]
            row["recovery"] = row["accuracy"] / own if own else None
            bar = BARS.get((name, how))
            if bar is not None and row["recovery"] is not None:
                row["met"] = row["recovery"] >= bar
            yield row


def form_of(name: str, group: int) -> Format:
    """A format by its name; INT4 in groups of so many columns."""
    return format_of(name, group if name == "int4" else None)


def line(row: Row) -> str:
    """A row of the printed table."""
    known = [row["nll"], row["accuracy"]]
    values = [" " * 8 if value is None else f"{value:8.4f}" for value in known]
    kept = "" if row["recovery"] is None else f"{row['recovery']:9.2%}"
    bar = {True: "  met", False: "  NOT MET"}.get(row.get("met"), "")  # type: ignore[arg-type]
    return f"{row['format']:6} {row['after']:9} {row['size']:8} {' '.join(values)} {kept}{bar}"


def main() -> None:
    """Print the table, and write it as JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="held-out records")
    parser.add_argument("--limit", type=int, help="use the first N of them")
    parser.add_argument("--formats", default=FORMATS)
    parser.add_argument("--group", type=int, default=16, help="columns under a scale of int4")
    parser.add_argument("--after", default="", help="formats to measure after QAD, too")
    parser.add_argument("--train", type=Path, help="records to teach codes with")
    parser.add_argument("--recipe", type=Path, default=Path("recipes/demo-qad.yaml"))
    parser.add_argument("--set", action="append", default=[], help="override a recipe key")
    parser.add_argument("--nll", action="store_true", help="measure the loss only")
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--json", type=Path, help="a file for the rows")
    arguments = parser.parse_args()
    stock.quiet()
    settings = {"generate": not arguments.nll, "max_length": arguments.max_length}
    bench = Bench(arguments.checkpoint, read_records(arguments.data)[: arguments.limit], settings)
    rows = []
    print("format after     size          nll accuracy  recovery")
    formats = [name for name in arguments.formats.split(",") if name]
    found = [bench.rows(formats, arguments.group)]
    data = [f"data.train={arguments.train}", f"data.heldout={arguments.data}"]
    for name in filter(None, arguments.after.split(",")):
        overrides = [*(data if arguments.train else []), *arguments.set]
        found.append(bench.after(name, arguments.group, arguments.recipe, overrides))
    for several in found:
        for row in several:
            rows.append(row)
            print(line(row), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
