"""Make the demonstration's parent from nothing: problems, tokenizer, training, measurement.

    python -m demo.parent --recipe recipes/demo-parent.yaml --out runs/demo-parent

The folder `runs/demo-parent/parent` is what `demo/parent` in this repository holds.
"""

import argparse
import json
import shutil
from pathlib import Path

from rich.console import Console

from demo.data import data_files
from demo.tokenizer import build_tokenizer
from star_elastic import stock
from star_elastic.cli.progress import LiveLosses
from star_elastic.evaluate import evaluate
from star_elastic.model import ElasticModel
from star_elastic.records import read_records
from star_elastic.train.recipe import load_recipe
from star_elastic.train.run import train

_TOKENIZER_SAMPLE = 10_000  # problems


def make_tokenizer(train_path: Path, vocab_size: int, out: Path) -> None:
    """Train the byte-level tokenizer on the first training records."""
    records = read_records(train_path)[:_TOKENIZER_SAMPLE]
    texts = (record.prompt + record.completion for record in records)
    build_tokenizer(texts, vocab_size).save_pretrained(out)


def main() -> None:
    """Train the parent and print how good it is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", type=Path, default=Path("recipes/demo-parent.yaml"))
    parser.add_argument("--out", type=Path, default=Path("runs/demo-parent"))
    parser.add_argument("--train-records", type=int, default=60_000)
    parser.add_argument("--data", type=Path, help="train on records of your own instead, JSONL")
    parser.add_argument("--heldout-records", type=int, default=600)
    parser.add_argument("--set", action="append", default=[], help="override a recipe key")
    arguments = parser.parse_args()
    stock.quiet()
    console = Console()
    shutil.rmtree(arguments.out, ignore_errors=True)
    train_path, heldout_path = data_files(
        arguments.data, arguments.out, arguments.train_records, arguments.heldout_records
    )
    tokenizer = arguments.out / "tokenizer"
    paths = {"data.train": train_path, "data.heldout": heldout_path, "init.tokenizer": tokenizer}
    overrides = [*(f"{key}={path}" for key, path in paths.items()), *arguments.set]
    recipe = load_recipe(arguments.recipe, overrides)
    assert recipe.init is not None
    make_tokenizer(train_path, recipe.init.config["vocab_size"], tokenizer)
    live = LiveLosses(console, recipe.train.steps)
    with live.progress:
        folder = train(recipe, arguments.out, callbacks=[live])
    quality = evaluate(ElasticModel.from_pretrained(folder), read_records(recipe.data.heldout))
    console.print_json(json.dumps(quality["full"]))


if __name__ == "__main__":
    main()
