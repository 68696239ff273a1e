"""Whole runs of tiny recipes: parents, data and settings made on the spot."""

import json
from pathlib import Path
from typing import Any

from models import SMALL, letters_tokenizer, tiny

from star_elastic.train.recipe import Recipe

WIDTHS = {field: n for field, n in SMALL["nemotron_h"].items() if field != "num_hidden_layers"}
STAGE = {"steps": 8, "sequence_length": 24, "rows": 2, "accumulate": 2, "warmup_steps": 2}


def make_data(folder: Path) -> Path:
    """A parent with its tokenizer, another of the same vocabulary, and two corpora."""
    for name, seed in (("parent", 0), ("other", 1)):
        tiny("nemotron_h", seed).save_pretrained(folder / name)
        letters_tokenizer().save_pretrained(folder / name)
    for name, sign in (("data", "+"), ("more", "-")):
        rows = [{"prompt": f"{n}{sign}{n}=", "completion": str(2 * n)} for n in range(40)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def recipe(folder: Path, **changes: Any) -> Recipe:
    """Eight steps of three sizes of the parent in a folder."""
    data = str(folder / "data.jsonl")
    values = {
        "parent": str(folder / "parent"),
        "data": {"train": data, "heldout": data},
        "sizes": {"full": {}, "small": WIDTHS, "prefix": {"hidden_size": 16}},
        "multiple_of": {"hidden_size": 8},
        "rank": {"samples": 16},
        "balance": {"rate": 0.01},
        "train": {"stages": [STAGE | {"learning_rate": 3e-3}], "save_every": 4},
    }
    return Recipe.model_validate_json(json.dumps(values | changes))


def logged(out: Path) -> list[dict[str, Any]]:
    """What a run says of its steps."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
