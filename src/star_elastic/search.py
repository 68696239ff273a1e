"""Sizes for budgets nobody trained for, searched for by calibration loss, without training.

Losses are measured on zero-copy views. The search descends greedily from the parent, always along
the axis that loses least per cost saved, then trades one axis against another near each budget.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from star_elastic.between import too_small
from star_elastic.budget import Metric
from star_elastic.evaluate import losses
from star_elastic.grid import Grid, State, grid_of, moves
from star_elastic.layout import Layout
from star_elastic.model import ElasticModel
from star_elastic.records import Record, encode
from star_elastic.submodel import Fields

_Price = tuple[bool, float]  # saves nothing; loss per cost saved
_UNSEEN: _Price = (False, -math.inf)


@dataclass(frozen=True)
class Found:
    """The best size within a budget: fields unlike the parent's, cost, loss, losses measured."""

    fields: dict[str, int]
    cost: float
    loss: float
    evaluated: int


def search(
    layout: Layout,
    axes: Mapping[str, Sequence[int]],
    metric: Metric,
    budgets: Sequence[float],
    loss: Callable[[Fields], float],
    evaluations: int = 200,
) -> dict[float, Found]:
    """The size of lowest loss within each budget, as far as a local search can tell.

    Args:
        axes: axis -> its choices (`budget.choices`); the parent's own value joins them.
        loss: of a size's fields, e.g. `calibration_loss`; never asked twice for one size.
        evaluations: losses measured for all budgets together, at most.

    Raises:
        ValueError: a budget below the smallest size's cost, an axis or a choice that this parent
            does not have, fewer evaluations than budgets.
    """
    grid = grid_of(layout, metric, axes)
    least = grid.cost(grid.smallest)
    wanted = sorted(set(budgets), reverse=True)
    if wanted and wanted[-1] < least:
        raise too_small(metric, wanted[-1], least)
    if evaluations < len(wanted):
        raise ValueError(f"evaluations = {evaluations}: fewer than the {len(wanted)} budgets")
    measured = _Losses(grid, loss)
    found, state = {}, grid.full
    for n, budget in enumerate(wanted):
        # each budget has its share, and one more loss to know what it came to
        measured.allowed = (evaluations - len(wanted)) * (n + 1) // len(wanted) + n
        state = _exchange(grid, measured, _descend(grid, measured, state, budget), budget)
        fields, cost = grid.fields(state), grid.cost(state)
        found[budget] = Found(fields, cost, measured.surely(state), len(measured.known))
    return {budget: found[budget] for budget in budgets}


def calibration_loss(
    model: ElasticModel, records: Sequence[Record], max_length: int = 512
) -> Callable[[Fields], float]:
    """The mean loss per completion token, in nats, of any size on a fixed sample.

    Raises:
        ValueError: no completion token within `max_length`.
    """
    sample = [replace(record, task="calibration") for record in records]
    if not any(
        example.spans for example in encode(model.tokenizer, sample, max_length, "completion")
    ):
        raise ValueError(f"calibration: no completion starts within {max_length} tokens")

    @torch.no_grad()
    def loss(fields: Fields) -> float:
        view = model.submodel(**fields)
        return losses(view, model.tokenizer, sample, max_length)["calibration"]

    return loss


@dataclass
class _Losses:
    """Losses measured so far; at most `allowed` of them."""

    grid: Grid
    measure: Callable[[Fields], float]
    known: dict[State, float] = field(default_factory=dict)
    allowed: int = 0

    def of(self, state: State) -> float | None:
        """The loss of a size; None once no more may be measured."""
        if state not in self.known and len(self.known) >= self.allowed:
            return None
        return self.surely(state)

    def surely(self, state: State) -> float:
        if state not in self.known:
            loss = self.measure(self.grid.fields(state))
            self.known[state] = math.inf if math.isnan(loss) else loss
        return self.known[state]


def _descend(grid: Grid, measured: _Losses, state: State, budget: float) -> State:
    """Shrink one axis at a time, the one that loses least per cost saved, until it fits."""
    prices: dict[int, _Price] = {}
    while grid.cost(state) > budget:
        every = {axis: grid.shrunk(state, axis) for axis in range(len(state))}
        steps = {axis: step for axis, step in every.items() if step is not None}
        if not steps:
            return grid.smallest  # the stock class expresses nothing between
        axis = _cheapest(grid, measured, state, steps, prices)
        if axis is None:  # no more losses: shrink all alike
            axis = max(
                steps, key=lambda n: (grid.saved(state, steps[n]) > 0, state[n] / grid.full[n])
            )
        state = steps[axis]
    return state


def _cheapest(
    grid: Grid,
    measured: _Losses,
    state: State,
    steps: Mapping[int, State],
    prices: dict[int, _Price],
) -> int | None:
    """The axis of the lowest price. Prices rise as a model shrinks, so that only those that look
    lowest are asked again (lazy greedy: Minoux 1978)."""
    fresh = set()
    while (axis := min(steps, key=lambda n: prices.get(n, _UNSEEN))) not in fresh:
        before, after = measured.of(state), measured.of(steps[axis])
        if before is None or after is None:
            return None
        saved = grid.saved(state, steps[axis])
        lost = after - before if after < math.inf else math.inf
        prices[axis] = (saved <= 0, lost / saved if saved > 0 else lost)
        fresh.add(axis)
    return axis


def _exchange(grid: Grid, measured: _Losses, state: State, budget: float) -> State:
    """Take the first move that lowers the loss, again and again, until none does."""
    best = measured.of(state)
    improved = best is not None
    while improved:
        improved = False
        for other in moves(grid, state, budget):
            loss = measured.of(other)
            if loss is None:
                return state
            if best is not None and loss < best:
                state, best, improved = other, loss, True
                break
    return state
