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
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.func import functional_call

from star_elastic import stock
from star_elastic.model import ElasticModel
from star_elastic.records import Batch, Example
from star_elastic.submodel import ElasticSpace
from star_elastic.train.data import Batches
from star_elastic.train.distillation import next_token_loss
from star_elastic.train.recipe import Optimise
from star_elastic.train.trainer import Trainer


class MaskedTrainer(Trainer):
    """What others do: the parent at full width, its parameters multiplied by masks."""

    def mask(self, fields: Mapping[str, int]) -> None:
        """Fix the size: ones where the submodel is, zeros elsewhere."""
        layout = self.model.layout
        child = layout.sizes_of(fields)
        self.masks = {name: torch.zeros_like(tensor) for name, tensor in self.weights.items()}
        for name, ones in self.masks.items():
            layout.take(name, ones, child).fill_(1)

    def loss(self, batch: Batch, size: str) -> Tensor:
        """Next-token loss of the masked parent."""
        tensors = {name: tensor * self.masks[name] for name, tensor in self.weights.items()}
        inputs = {"input_ids": batch.input_ids, "use_cache": False}
        logits = functional_call(self.skeletons["full"], tensors, kwargs=inputs).logits
        return next_token_loss(logits, batch.input_ids, batch.targets)


def step_cost(
    model: ElasticModel, size: str, tokens: int = 4096, length: int = 64, repeats: int = 11
) -> dict[str, float]:
    """Median seconds of a training step at one size, three ways, and the ratios to `alone`."""
    fields = model.sizes[size].config
    parent = ElasticModel(copy.deepcopy(model.parent))
    parent.space = ElasticSpace.of(parent.layout, {"full": {}, size: fields})
    masked_parent = ElasticModel(copy.deepcopy(model.parent))
    alone = ElasticModel(copy.deepcopy(model.submodel(**fields)))
    batches = _batches(model.layout.sizes["vocab_size"], tokens, length)
    only = Optimise(steps=10**6, tokens=tokens, size_probs={size: 1.0})
    whole = only.model_copy(update={"size_probs": None})
    masked = MaskedTrainer(masked_parent, None, batches, whole)
    masked.mask(fields)
    trainers = {
        "narrowed": Trainer(parent, None, batches, only),
        "alone": Trainer(alone, None, batches, whole),
        "masked": masked,
    }
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    streams = {name: iter(batches) for name in trainers}
    for repeat in range(repeats + 2):
        for name, trainer in trainers.items():
            start = time.perf_counter()
            trainer.step(streams[name])
            if repeat >= 2:  # the first ones warm caches and allocate
                seconds[name].append(time.perf_counter() - start)
    medians = {name: median(values) for name, values in seconds.items()}
    ratios = {f"{name}_over_alone": medians[name] / medians["alone"] for name in medians}
    return {**{f"{name}_seconds": value for name, value in medians.items()}, **ratios}


def _batches(vocabulary: int, tokens: int, length: int) -> Batches:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(vocabulary, (tokens // length * 8, length), generator=generator)
    return Batches([Example(row, 1) for row in rows.tolist()], tokens, 0, seed=0)


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--size", default="small")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=21)
    arguments = parser.parse_args()
    stock.quiet()
    model = ElasticModel.from_pretrained(arguments.checkpoint)
    figures = step_cost(model, arguments.size, arguments.tokens, repeats=arguments.repeats)
    print(json.dumps({"threads": torch.get_num_threads(), **figures}, indent=2))


if __name__ == "__main__":
    main()
