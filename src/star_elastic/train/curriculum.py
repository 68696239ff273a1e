"""Stages of a run: which one a step belongs to, its learning rate, and the sizes drawn in it."""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from star_elastic.submodel import Fields
from star_elastic.train.recipe import Optimise, Stage

BETWEEN = "between"  # stands for the sizes that have no name


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


def drawn(
    settings: Optimise, stage: Stage, sizes: Mapping[str, Fields], between: Sequence[Fields], n: int
) -> dict[str, Fields]:
    """The sizes that learn from the n-th micro-batch: distinct, by the stage's probabilities.

    Some draws (`settings.between`) land on a size between the named ones instead.

    A function of the seed and the position, so that a resume, and any number of processes, draw
    alike; `same_size` micro-batches in a row share a draw.
    """
    draw = random.Random(f"size/{settings.seed}/{n // settings.same_size}")
    probs = stage.size_probs or dict.fromkeys(sizes, 1.0)
    left = {name: probs[name] for name in sizes if probs.get(name)}
    found: dict[str, Fields] = {}
    for _ in range(min(settings.sizes_per_batch, len(left))):
        (name,) = draw.choices(list(left), list(left.values()))
        del left[name]
        found[name] = sizes[name]
    if between and draw.random() < settings.between:
        found.pop(list(found)[-1])
        found[BETWEEN] = draw.choice(between)
    return found


def check_processes(settings: Optimise, processes: int) -> None:
    """Processes share a step's micro-batches, and run the same sizes at the same time.

    Raises:
        ValueError: naming the key that is no multiple of their number.
    """
    counts = {"same_size": settings.same_size}
    for number, stage in enumerate(settings.stages):
        counts[f"stages.{number}.accumulate"] = stage.accumulate
    for key, count in counts.items():
        if count % processes:
            raise ValueError(
                f"train.{key} = {count}: with {processes} processes it must be a multiple of "
                f"{processes}"
            )
