"""The sizes on offer as positions on a grid, one dimension an axis: costs, verdicts, moves."""

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from star_elastic import configs
from star_elastic.budget import Metric
from star_elastic.layout import Layout
from star_elastic.submodel import Fields, check_fields, per_layer

State = tuple[int, ...]  # for every axis, which of its choices
_LEVELS = 4  # a stride is this part of an axis' range: few losses to measure on the way down
_FEW = 9  # choices that are all tried in an exchange; of more, every power of two


def holds(layout: Layout, fields: Fields) -> bool:
    """Can this parent hold such a size, and the stock class express it (layers, if they differ)?"""
    try:
        check_fields(layout, fields)
        if not per_layer(fields):
            configs.child_config(layout, fields)
    except ValueError:
        return False
    return True


@dataclass
class Grid:
    """The sizes on offer, as positions on every axis; costs and verdicts are remembered."""

    layout: Layout
    metric: Metric
    values: dict[str, list[int]]
    _costs: dict[State, float] = field(default_factory=dict)
    _holds: dict[State, bool] = field(default_factory=dict)

    @property
    def full(self) -> State:
        """The parent itself."""
        return tuple(len(values) - 1 for values in self.values.values())

    @property
    def smallest(self) -> State:
        """Every axis at its least choice."""
        return (0,) * len(self.values)

    def fields(self, state: State) -> dict[str, int]:
        """Config fields, those of the parent's own value left out."""
        chosen = zip(self.values.items(), state, strict=True)
        fields = {axis: values[n] for (axis, values), n in chosen}
        return {a: value for a, value in fields.items() if value != self.layout.sizes[a]}

    def cost(self, state: State) -> float:
        """What the metric says, in its unit."""
        if state not in self._costs:
            sizes = self.layout.sizes_of(self.fields(state))
            self._costs[state] = float(self.metric.cost(self.layout, sizes))
        return self._costs[state]

    def saved(self, state: State, lower: State) -> float:
        """How much cheaper `lower` is."""
        return self.cost(state) - self.cost(lower)

    def holds(self, state: State) -> bool:
        """Can this be a size at all?"""
        if state not in self._holds:
            self._holds[state] = holds(self.layout, self.fields(state))
        return self._holds[state]

    def shrunk(self, state: State, axis: int) -> State | None:
        """One stride down an axis, further where the stock class refuses what lies there."""
        stride = math.ceil(self.full[axis] / _LEVELS)
        for n in [*range(state[axis] - stride, 0, -1), 0] if state[axis] else []:
            if self.holds(lower := _moved(state, axis, n)):
                return lower
        return None

    def grown(self, state: State, axis: int, budget: float) -> State | None:
        """As far up an axis as the budget allows; None where it cannot grow."""
        here = state[axis]
        sizes = range(here + 1, self.full[axis] + 1)
        fit = bisect_right(sizes, budget, key=lambda n: self.cost(_moved(state, axis, n)))
        for n in range(here + fit, here, -1):
            if self.cost(higher := _moved(state, axis, n)) <= budget and self.holds(higher):
                return higher
        return None


def grid_of(layout: Layout, metric: Metric, axes: Mapping[str, Sequence[int]]) -> Grid:
    """The grid of some axes' choices; the parent's own value joins them.

    Raises:
        ValueError: no axes, an axis or a choice that this parent does not have, a smallest size
            that the stock class cannot express.
    """
    if not axes or not all(axes.values()):
        raise ValueError("no axis to shrink, or an axis without choices")
    smallest = {axis: min(choices) for axis, choices in axes.items()}
    check_fields(layout, smallest)
    configs.child_config(layout, smallest)
    for axis, choices in axes.items():
        for choice in choices:
            try:
                check_fields(layout, {axis: choice})
            except ValueError:  # few experts are fine where fewer are used, too
                check_fields(layout, {**smallest, axis: choice})
    values = {axis: sorted({*choices, layout.sizes[axis]}) for axis, choices in axes.items()}
    return Grid(layout, metric, values)


def moves(grid: Grid, state: State, budget: float) -> Iterator[State]:
    """Sizes nearby and within the budget: one axis up; one down, another up; one down."""
    axes = range(len(state))
    yield from _present(grid.grown(state, axis, budget) for axis in axes)
    for axis in axes:
        for jump in _jumps(grid.full[axis] + 1):
            if jump > state[axis]:
                continue
            lower = _moved(state, axis, state[axis] - jump)
            if grid.cost(lower) > budget:  # a table of latencies may say so
                continue
            yield from _present(grid.grown(lower, other, budget) for other in axes if other != axis)
            if grid.holds(lower):
                yield lower


def _present(states: Iterator[State | None]) -> Iterator[State]:
    return (state for state in states if state is not None)


def _jumps(choices: int) -> list[int]:
    if choices <= _FEW:
        return list(range(1, choices))
    return [2**n for n in reversed(range((choices - 1).bit_length()))]


def _moved(state: State, axis: int, to: int) -> State:
    return (*state[:axis], to, *state[axis + 1 :])
