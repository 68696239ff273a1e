"""Claim: one file of eight bits in groups serves every size at every precision below about as well
as codes that are made for each precision alone.

    python -m bench.bits CKPT --data heldout.jsonl [--group 16] [--bits 8,4,3,2] [--nll]

CKPT is an elastic checkpoint, say `runs/demo/elastic`. It is quantized once (`--format int8 --group
N`), and that one folder is read at each number of bits; beside it every matrix is quantized at that
number alone, by the same rule (the largest magnitude of a group is half the range, less a half).
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from star_elastic import stock
from star_elastic.checkpoint import Checkpoint
from star_elastic.evaluate import evaluate, mean
from star_elastic.model import ElasticModel
from star_elastic.precision import INT8Groups, quantized
from star_elastic.quantize import make_plan, quantize_checkpoint
from star_elastic.records import read_records

Row = dict[str, Any]


@torch.no_grad()
def alone(path: Path, bits: int, group: int) -> ElasticModel:
    """The checkpoint, its matrices replaced by what codes of so many bits stand for."""
    model, half = ElasticModel.from_pretrained(path), 1 << (bits - 1)
    state = model.state
    for weight in quantized(model.layout).values():
        matrix = model.layout.view(state, weight)
        values = matrix.unflatten(-1, (-1, group))
        scale = values.abs().amax(-1, keepdim=True).clamp(min=1e-30) / (half - 0.5)
        codes = (values / scale).round().clamp(-half, half - 1)
        matrix.copy_((codes * scale).flatten(-2))
    return model


def main() -> None:
    """Print a table, and write it as JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="held-out records")
    parser.add_argument("--limit", type=int, help="use the first N of them")
    parser.add_argument("--group", type=int, default=16, help="columns under a scale")
    parser.add_argument("--bits", default="8,6,4,3,2")
    parser.add_argument("--nll", action="store_true", help="measure the loss only")
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--json", type=Path, help="a file for the rows")
    arguments = parser.parse_args()
    stock.quiet()
    records = read_records(arguments.data)[: arguments.limit]
    settings = {"generate": not arguments.nll, "max_length": arguments.max_length}
    rows: list[Row] = []

    def measure(model: ElasticModel, bits: int | None, how: str) -> None:
        for size, quality in evaluate(model, records, **settings).items():
            row = {"bits": bits, "how": how, "size": size}
            row |= {"nll": mean(quality, "nll"), "accuracy": mean(quality)}
            print(json.dumps(row), flush=True)
            rows.append(row)

    with tempfile.TemporaryDirectory() as folder:
        planned = make_plan(Checkpoint.open(arguments.checkpoint), INT8Groups(arguments.group))
        quantize_checkpoint(planned, Path(folder) / "q")
        measure(ElasticModel.from_pretrained(arguments.checkpoint), None, "numbers")
        for bits in map(int, arguments.bits.split(",")):
            measure(ElasticModel.from_pretrained(Path(folder) / "q", bits=bits), bits, "one file")
            measure(alone(arguments.checkpoint, bits, arguments.group), bits, "alone")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
