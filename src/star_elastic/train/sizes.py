"""Sizes by hand: config fields, or a fraction of the parent's active parameters."""

from collections.abc import Mapping

from star_elastic import configs
from star_elastic.between import interpolate
from star_elastic.budget import Metric
from star_elastic.layout import Layout
from star_elastic.submodel import Fields
from star_elastic.train.recipe import Recipe, RecipeError

_ALIGN = 8  # widths that nobody aligned otherwise stay multiples of this
_WIDTHS = (
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "moe_shared_expert_intermediate_size",
)


def named_sizes(layout: Layout, recipe: Recipe) -> dict[str, dict[str, int | list[int]]]:
    """The recipe's sizes as config fields; a fraction shrinks all widths alike.

    Raises:
        RecipeError: no width reaches the fraction.
    """
    sizes: dict[str, dict[str, int | list[int]]] = {}
    for name, size in recipe.sizes.items():
        if isinstance(size, dict):
            sizes[name] = size
        else:
            sizes[name] = {**by_fraction(layout, size, recipe.multiple_of, f"sizes.{name}")}
    return sizes


def rungs(
    layout: Layout, sizes: Mapping[str, Fields], count: int, multiple_of: Mapping[str, int]
) -> list[Fields]:
    """Sizes between the named ones, evenly spaced in active parameters: no named one, none twice.

    Trained now and then, they keep the curve from the smallest to the largest size without a cliff
    (sizes sampled at random: MatFormer, arXiv 2310.07707).
    """
    metric = Metric(kind="active")
    costs = [layout.count_active(layout.sizes_of(fields)) for fields in sizes.values()]
    low, high = min(costs), max(costs)
    found: list[Fields] = []
    for n in range(count):
        budget = low + (n + 1) / (count + 1) * (high - low)
        fields = interpolate(layout, sizes, metric, budget, multiple_of)
        if fields not in (*sizes.values(), *found):
            found.append(fields)
    return found


def by_fraction(
    layout: Layout, fraction: float, multiple_of: Mapping[str, int], where: str = "size"
) -> dict[str, int]:
    """Widths scaled alike, so that the active parameters come nearest to a share of the parent's.

    Raises:
        RecipeError: nothing that the stock class can express comes within 0.1 of the fraction.
    """
    if not 0 < fraction <= 1:
        raise RecipeError(f"{where}: {fraction} is no share of the parent (0 to 1)")
    if fraction == 1:
        return {}
    full = layout.count_active()
    best: tuple[float, dict[str, int]] | None = None
    for percent in range(5, 100):
        fields = {
            field: _scaled(layout.sizes[field], percent / 100, multiple_of.get(field, _ALIGN))
            for field in _WIDTHS
            if field in layout.axes
        }
        share = layout.count_active(layout.sizes_of(fields)) / full
        miss = abs(share - fraction)
        if (best is None or miss < best[0]) and _expressible(layout, fields):
            best = (miss, fields)
    if best is None or best[0] > 0.1:
        raise RecipeError(f"{where}: no size is near {fraction} of the parent's active parameters")
    return best[1]


def _scaled(width: int, scale: float, multiple: int) -> int:
    return max(multiple, min(width, round(width * scale / multiple) * multiple))


def _expressible(layout: Layout, fields: dict[str, int]) -> bool:
    try:
        configs.child_config(layout, fields)
    except ValueError:
        return False
    return True
