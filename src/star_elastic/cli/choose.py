"""Which sizes `slice` and `export` cut: named, by fields, or the best within a budget."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from star_elastic.cli.candidates import (
    Candidate,
    best_of,
    budget_of,
    metric_of,
    print_candidates,
    proposed,
)

if TYPE_CHECKING:
    from star_elastic.align import Alignment
    from star_elastic.checkpoint import Checkpoint
    from star_elastic.submodel import Fields, Submodel

_NEAR = 0.98  # of a cost: closer than that, and a size that somebody tried is the better one


def named(
    opened: "Checkpoint", names: Sequence[str], alignment: "Alignment"
) -> dict[str, "Submodel"]:
    """Sizes by their names, each held against what the target needs."""
    found = {name: opened.size(name) for name in names}
    for size in found.values():
        alignment.check(opened.layout, size.config)
    return found


def by_fields(opened: "Checkpoint", texts: Sequence[str], alignment: "Alignment") -> "Submodel":
    """The size that some fields tell: `hidden_size=1920`.

    Raises:
        ValueError: a field twice, one the parent cannot hold, one the target cannot use.
    """
    from star_elastic.budget import parse_field
    from star_elastic.slicing import custom

    pairs = [parse_field(text, "--set") for text in texts]
    fields = dict(pairs)
    if len(fields) < len(pairs):
        twice = next(name for name, _ in pairs if [n for n, _ in pairs].count(name) > 1)
        raise ValueError(f"--set {twice}: said twice")
    size = custom(opened, fields)
    alignment.check(opened.layout, fields)
    return size


def within(
    opened: "Checkpoint",
    given: Mapping[str, str | None],
    context: str,
    batch: int,
    alignment: "Alignment",
    console: Console,
) -> "Submodel":
    """The best size within a budget: the router's choice, else the largest of the named sizes and
    the one between them. Prints what was compared.

    Raises:
        ValueError: no size is within the budget and of use to the target.
    """
    from star_elastic.between import too_small
    from star_elastic.slicing import custom

    kind, budget = budget_of(given, "slice")
    metric = metric_of(opened, kind, context, batch)
    steps = {axis: each.multiple_of for axis, each in opened.space.axes.items()}
    for axis, step in alignment.for_codes(opened.weights.values()).steps(opened.layout).items():
        steps[axis] = math.lcm(steps.get(axis, 1), step)
    found = proposed(opened, metric, budget, steps, console)
    fit = [each for each in found if _is_aligned(opened, each.fields, alignment)]
    if not fit:
        if found:
            raise ValueError(f"--{kind} {given[kind]}: no size within it is aligned: {_why(found)}")
        sizes = (opened.layout.sizes_of(size.config) for size in opened.space.submodels)
        least = min(float(metric.cost(opened.layout, child)) for child in sizes)
        raise too_small(metric, budget, least)
    best = _preferred(fit)
    print_candidates(console, metric, budget, found, best)
    console.print(_reason(best, found, fit))
    if best.name in opened.space.sizes:
        return opened.size(best.name)
    return custom(opened, best.fields, f"{kind}-{given[kind]}".replace(" ", ""))


def _preferred(fit: Sequence[Candidate]) -> Candidate:
    """The router's choice or the largest; but a size with a name, trained or searched for and
    stored, rather than one in between that is hardly larger."""
    best = best_of(fit, measured=False)
    near = [each for each in fit if each.cost >= _NEAR * best.cost and each.name != "between"]
    return max(near, key=lambda each: each.cost) if best.name == "between" and near else best


def _is_aligned(opened: "Checkpoint", fields: "Fields", alignment: "Alignment") -> bool:
    try:
        alignment.check(opened.layout, fields)
    except ValueError:
        return False
    return True


def _reason(best: Candidate, found: Sequence[Candidate], fit: Sequence[Candidate]) -> str:
    """Why this one, in a sentence."""
    why = {
        "router": "the trained router chose it for this budget",
        "between": "the largest within the budget, on the line between the named sizes around it",
    }.get(best.name, "the largest named size within the budget")
    passed = [each.name for each in found if each not in fit]
    return f"chosen: {best.name}, {why}" + (f"; not aligned: {', '.join(passed)}" if passed else "")


def _why(found: Sequence[Candidate]) -> str:
    return ", ".join(f"{each.name} {dict(each.fields)}" for each in found)


def warn(opened: "Checkpoint", size: "Submodel", console: Console) -> None:
    """Say of a size that was cut that nobody trained it."""
    from star_elastic import card

    if size.name not in opened.space.sizes and opened.space.training is None:
        console.print("[yellow]nobody trained or measured this very size[/yellow]")
    elif warning := card.warning(size, opened.space):
        console.print(f"[red]{size.name}: {warning}[/red]")
