"""Sizes between two named ones, for budgets that nobody trained for.

As LLaMaFlex (ICLR 2025) interpolates: every field on the straight line from the smaller size to the
larger, at the nearest value that the stock class and the alignment allow.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence

from star_elastic.budget import Metric, step_on
from star_elastic.grid import holds
from star_elastic.layout import Layout
from star_elastic.submodel import Fields

_PARTS = 4096  # of the line between two sizes: as fine as most widths


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
