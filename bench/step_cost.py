"""Claim: a training step at a size costs what a stand-alone model of that size costs.

Times whole training steps (forward, backward, clipping, AdamW), interleaved, on the same batches:
`narrowed` in the parent's weights, `alone` as a model of its own, `masked` at full width with the
parent's parameters multiplied by 0/1 masks.

    python -m bench.step_cost CHECKPOINT --size small
"""

import argparse
import copy
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from star_elastic import stock
from star_elastic.model import ElasticModel
from star_elastic.records import Batch
from star_elastic.submodel import Fields
from star_elastic.train.parts import Cut, Parts
from star_elastic.train.recipe import Optimise, Stage
from star_elastic.train.trainer import Trainer


@dataclass(frozen=True)
class Multiplied:
    """What others do: the parent at full width, its parameters multiplied by masks."""

    masks: Mapping[str, Tensor]

    def tensors(self, layer: int | None, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Ones where the submodel is, zeros elsewhere."""
        return {name: tensor * self.masks[name] for name, tensor in whole.items()}


class MaskedTrainer(Trainer):
    """Runs every size as the masked parent."""

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        self.made: dict[str, tuple[PreTrainedModel, Cut]] = {}

    def skeleton(self, fields: Fields, reading: int = 0) -> tuple[PreTrainedModel, Cut]:
        """The full skeleton, whatever the size."""
        key = repr(fields)
        if key not in self.made:
            layout = self.parts.layout
            masks = {name: torch.zeros_like(tensor) for name, tensor in self.weights.items()}
            for name, ones in masks.items():
                layout.take(name, ones, layout.sizes_of(fields)).fill_(1)
            self.made[key] = self.parts.skeleton({}), Multiplied(masks)
        return self.made[key]


class Fixed:
    """A stream that gives one packed batch for ever."""

    def __init__(self, batch: Batch):
        self.batch = batch
        self.state: dict[str, Any] = {}

    def __next__(self) -> Batch:
        return self.batch

    def take(self, count: int, keep: Any = None) -> list[Batch]:
        """The batch, `count` times."""
        return [self.batch] * count


def fixed_batch(vocabulary: int, rows: int, length: int, documents: int = 4) -> Batch:
    """Random tokens in packed rows of a few documents each."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(vocabulary, (rows, length), generator=generator)
    owners = torch.arange(length, dtype=torch.int32) * documents // length
    real = torch.ones(rows, length, dtype=torch.bool)
    targets = real & (owners == owners.roll(1))
    targets[:, 0] = False
    return Batch(input_ids, real, targets, owners.expand(rows, length).contiguous())


def step_cost(
    model: ElasticModel, size: str, rows: int = 16, length: int = 256, repeats: int = 11
) -> dict[str, float]:
    """Median seconds of a training step at one size, three ways, and the ratios to `alone`."""
    fields = model.sizes[size].config
    batch = fixed_batch(model.layout.sizes["vocab_size"], rows, length)
    stage = Stage(steps=10**6, sequence_length=length, rows=rows)

    def trainer(kind: type[Trainer], parent: ElasticModel, cut: Fields) -> Trainer:
        parts = Parts(parent.layout, parent.state)
        streams: Any = lambda number: Fixed(batch)  # noqa: E731
        return kind(parts, {size: cut}, Optimise(stages=[stage]), streams)

    def copied() -> ElasticModel:
        return ElasticModel(copy.deepcopy(model.parent), layer_order=model.layout.layer_order)

    alone = ElasticModel(copy.deepcopy(model.submodel(**fields)))
    trainers = {
        "narrowed": trainer(Trainer, copied(), fields),
        "alone": trainer(Trainer, alone, {}),
        "masked": trainer(MaskedTrainer, copied(), fields),
    }
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    for repeat in range(repeats + 2):
        for name, each in trainers.items():
            start = time.perf_counter()
            each.step()
            if repeat >= 2:  # the first ones warm caches and allocate
                seconds[name].append(time.perf_counter() - start)
    medians = {name: median(values) for name, values in seconds.items()}
    ratios = {f"{name}_over_alone": medians[name] / medians["alone"] for name in medians}
    return {**{f"{name}_seconds": value for name, value in medians.items()}, **ratios}


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--size", default="small")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=21)
    arguments = parser.parse_args()
    stock.quiet()
    model = ElasticModel.from_pretrained(arguments.checkpoint)
    figures = step_cost(model, arguments.size, arguments.rows, repeats=arguments.repeats)
    print(json.dumps({"threads": torch.get_num_threads(), **figures}, indent=2))


if __name__ == "__main__":
    main()
