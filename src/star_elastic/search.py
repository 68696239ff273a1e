"""Sizes for budgets nobody trained for, found without training.

Two ways: between two named sizes, as LLaMaFlex (ICLR 2025) interpolates; or a search by calibration
loss, measured on zero-copy views. The search descends greedily from the parent, always along the
axis that loses least per cost saved, then trades one axis against another near each budget.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from star_elastic.budget import Metric, step_on
from star_elastic.evaluate import losses
from star_elastic.grid import Grid, State, grid_of, holds, moves
from star_elastic.layout import Layout
from star_elastic.model import ElasticModel
from star_elastic.records import Record, encode
from star_elastic.submodel import Fields

_Price = tuple[bool, float]  # saves nothing; loss per cost saved
_UNSEEN: _Price = (False, -math.inf)
_PARTS = 4096  # of the line between two sizes: as fine as most widths


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


def interpolate(
    layout: Layout,
    sizes: Mapping[str, Fields],
    metric: Metric,
    budget: float,
    multiple_of: Mapping[str, int] | None = None,
) -> dict[str, int | list[int]]:
    """The largest size within a budget on the line between the two named sizes that enclose it.

    At or above the costliest size it is that size; at a named size's own cost, that size. Values
    that the stock class refuses (some want a width that heads divide) are passed over.

    Raises:
        ValueError: a budget below the cheapest named size.
    """
    costs = {name: float(metric.cost(layout, layout.sizes_of(sizes[name]))) for name in sizes}
    within = [name for name in sizes if costs[name] <= budget]
    beyond = [name for name in sizes if costs[name] > budget]
    if not within:
        raise too_small(metric, budget, min(costs.values()))
    low = sizes[max(within, key=costs.__getitem__)]
    if not beyond:
        return dict(low)
    high = sizes[min(beyond, key=costs.__getitem__)]
    stops = _stops(layout, low, high, multiple_of or {})

    def fields(part: int) -> dict[str, int | list[int]]:
        return _between(layout, low, high, part / _PARTS, stops)

    def cost(part: int) -> float:
        return float(metric.cost(layout, layout.sizes_of(fields(part))))

    last: Fields | None = None
    for part in range(bisect_right(range(1, _PARTS), budget, key=cost), 0, -1):
        if (here := fields(part)) != last and cost(part) <= budget and holds(layout, here):
            return here
        last = here
    return dict(low)


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


def too_small(metric: Metric, budget: float, least: float) -> ValueError:
    """The one line that says a budget cannot be met, and what could be."""
    return ValueError(
        f"budget {metric.amount(budget)} ({metric.describe()}): "
        f"even the smallest size takes {metric.amount(least)}"
    )


def _between(
    layout: Layout, low: Fields, high: Fields, share: float, stops: Mapping[str, Sequence[int]]
) -> dict[str, int | list[int]]:
    """Every field on its way from one size to the other, at the nearest stop."""
    fields: dict[str, int | list[int]] = {}
    for axis, allowed in stops.items():
        whole = layout.sizes[axis]
        start, end = low.get(axis, whole), high.get(axis, whole)
        if isinstance(start, int) and isinstance(end, int):
            fields[axis] = _blend(start, end, share, allowed)
        else:
            pairs = zip(_spread(layout, start), _spread(layout, end), strict=True)
            fields[axis] = [_blend(a, b, share, allowed) for a, b in pairs]
    return {axis: value for axis, value in fields.items() if value != layout.sizes[axis]}


def _stops(
    layout: Layout, low: Fields, high: Fields, multiple_of: Mapping[str, int]
) -> dict[str, list[int]]:
    """The values a field may take between two sizes: on its step, and expressible in either."""
    stops = {}
    for axis in {**low, **high}:
        step, whole = step_on(layout, axis, multiple_of.get(axis, 1)), layout.sizes[axis]
        ends = [n for fields in (low, high) for n in _spread(layout, fields.get(axis, whole))]
        inner = range(math.ceil(min(ends) / step) * step, max(ends), step)
        both = [n for n in inner if all(holds(layout, {**f, axis: n}) for f in (low, high))]
        stops[axis] = sorted({*ends, *both})
    return stops


def _blend(a: int, b: int, share: float, stops: Sequence[int]) -> int:
    here = a + share * (b - a)
    return min((n for n in stops if min(a, b) <= n <= max(a, b)), key=lambda n: abs(n - here))


def _spread(layout: Layout, value: int | list[int]) -> list[int]:
    return value if isinstance(value, list) else [value] * len(layout.blocks)
