"""Stages of a run: which one a step belongs to, its learning rate, and the sizes drawn in it."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from star_elastic.train.recipe import Optimise, Stage


@dataclass(frozen=True)
class Place:
    """Where a step stands: the stage's number, and the step within it."""

    number: int
    stage: Stage
    step: int


def place(settings: Optimise, step: int) -> Place:
    """The stage of the n-th step of a run, counted from 0."""
    for number, stage in enumerate(settings.stages):
        if step < stage.length:
            return Place(number, stage, step)
        step -= stage.length
    raise IndexError("beyond the last stage")


def learning_rate(stage: Stage, step: int) -> float:
    """Linear warm-up, then a cosine towards `min_lr_ratio` of the peak at the stage's end."""
    if step < stage.warmup_steps:
        return stage.learning_rate * (step + 1) / stage.warmup_steps
    done = (step - stage.warmup_steps) / max(1, stage.length - stage.warmup_steps)
    low = stage.min_lr_ratio
    return stage.learning_rate * (low + (1 - low) * (1 + math.cos(math.pi * done)) / 2)


def drawn(settings: Optimise, stage: Stage, names: Sequence[str], micro_batch: int) -> list[str]:
    """The sizes that learn from the n-th micro-batch: distinct, by the stage's probabilities.

    A function of the seed and the position, so that a resume, and any number of processes, draw
    alike; `same_size` micro-batches in a row share a draw.
    """
    group = micro_batch // settings.same_size
    draw = random.Random(f"size/{settings.seed}/{group}")
    probs = stage.size_probs or dict.fromkeys(names, 1.0)
    weights = {name: probs.get(name, 0.0) for name in names}
    found: list[str] = []
    for _ in range(settings.sizes_per_batch):
        left = {name: weight for name, weight in weights.items() if weight and name not in found}
        if left:
            found += draw.choices(list(left), list(left.values()))
    return found
