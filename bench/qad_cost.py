"""Claim: learning for codes costs a step little: seconds of a step with and without fake codes.

    python -m bench.qad_cost CKPT [--size small] [--repeats 15]

CPU seconds of one thread, formats taking turns; the teacher is each size's own. Other work on the
machine slows both alike.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.step_cost import Fixed, fixed_batch
from star_elastic import stock, tensors
from star_elastic.checkpoint import Checkpoint
from star_elastic.precision import format_of, quantized
from star_elastic.train.coded import Coding
from star_elastic.train.distributed import World
from star_elastic.train.load import load_parts
from star_elastic.train.recipe import Optimise, Stage
from star_elastic.train.teacher import Teacher
from star_elastic.train.trainer import Trainer


def trainer(opened: Checkpoint, size: str, form: str | None, rows: int, length: int) -> Trainer:
    """One that runs a size on a fixed batch, for the codes of a format or for none."""
    layout = opened.layout
    coding = None
    if form is not None:
        stored = {name: tensors.dtype_of(opened, w) for name, w in layout.weights.items()}
        made = format_of(form, 16 if form == "int4" else None)
        coding = Coding(layout, [made], quantized(layout).values(), stored)
    batch = fixed_batch(layout.sizes["vocab_size"], rows, length)
    streams: Any = lambda number: Fixed(batch)  # noqa: E731
    settings = Optimise(stages=[Stage(steps=10**6, sequence_length=length, rows=rows)])
    parts, taught = load_parts(opened, World(), torch.float32), load_parts(opened, World())
    sizes = {size: opened.size(size).config}
    return Trainer(parts, sizes, settings, streams, Teacher(taught, own=True), coding=coding)


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--size", default="small")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    stock.quiet()
    torch.set_num_threads(1)
    opened = Checkpoint.open(arguments.checkpoint)
    shape = (arguments.rows, arguments.length)
    formats = (None, "fp8", "nvfp4", "int8", "int4")
    trainers = {form: trainer(opened, arguments.size, form, *shape) for form in formats}
    seconds: dict[str | None, list[float]] = {form: [] for form in formats}
    for repeat in range(arguments.repeats + 2):
        for form, each in trainers.items():
            start = time.process_time()
            each.step()
            if repeat >= 2:  # the first ones warm caches and allocate
                seconds[form].append(time.process_time() - start)
    plain = median(seconds[None])
    found = {str(form): round(median(each), 4) for form, each in seconds.items()}
    ratios = {str(form): round(median(each) / plain, 3) for form, each in seconds.items()}
    print(json.dumps({"size": arguments.size, "cpu_seconds": found, "over_none": ratios}))


if __name__ == "__main__":
    main()
