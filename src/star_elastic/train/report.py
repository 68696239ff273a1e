"""What a step gathers while it runs, and what it reports when it is done."""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from star_elastic.train.balance import Loads

Losses = Mapping[str, Sequence[float]]


@dataclass
class StepReport:
    """What one optimizer step did: mean loss per size drawn, gradient norm, pace."""

    step: int
    stage: int
    losses: dict[str, float]
    learning_rate: float
    grad_norm: float
    tokens: int
    seconds: float
    sizes: dict[str, int] = field(default_factory=dict)  # micro-batches per size
    router: dict[str, float] = field(default_factory=dict)  # its losses, where it learned

    def scalars(self) -> Iterator[tuple[str, float]]:
        """The report flat, for plots: `loss/small`, `learning_rate`, ..."""
        for kind, values in (("loss", self.losses), ("router", self.router)):
            yield from ((f"{kind}/{name}", value) for name, value in values.items())
        for name in ("learning_rate", "grad_norm", "tokens", "stage"):
            yield name, float(getattr(self, name))


@dataclass
class Gathered:
    """The losses, expert loads and tokens of one process's micro-batches in one step."""

    losses: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    router: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    loads: Loads = field(default_factory=Loads)
    tokens: int = 0
    bad: list[str] = field(default_factory=list)  # what is not finite, and where

    def add(self, kind: str, name: str, value: float, micro_batch: int) -> None:
        """Note a loss (`kind`: losses or router)."""
        getattr(self, kind)[name].append(value)
        if not math.isfinite(value):
            where = "size" if kind == "losses" else "router's"
            self.bad.append(f"loss {value} at {where} {name}, micro-batch {micro_batch}")


def means(found: Sequence[Losses]) -> dict[str, float]:
    """The mean of each loss over all processes, in order of appearance."""
    return {name: sum(values) / len(values) for name, values in _merged(found).items()}


def counts(found: Sequence[Losses]) -> dict[str, int]:
    """How often each loss was taken, over all processes."""
    return {name: len(values) for name, values in _merged(found).items()}


def _merged(found: Sequence[Losses]) -> dict[str, list[float]]:
    names = {name: None for each in found for name in each}
    return {name: [v for each in found for v in each.get(name, [])] for name in names}
