"""A run that teaches an elastic parent its codes: order and sizes stay, and so does the router."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from star_elastic import tensors
from star_elastic.checkpoint import Checkpoint
from star_elastic.folder import CheckpointError, copy_file
from star_elastic.precision import quantized
from star_elastic.submodel import ElasticSpace, Fields, Training
from star_elastic.train.coded import Coding
from star_elastic.train.recipe import Recipe
from star_elastic.train.router import ROUTER
from star_elastic.train.sizes import named_sizes
from star_elastic.train.state import Position


def open_parent(recipe: Recipe, check_digests: bool = True) -> Checkpoint:
    """The recipe's parent, which is to be elastic already.

    Raises:
        CheckpointError: it is not, or cannot be trusted.
    """
    opened = Checkpoint.open(str(recipe.parent), check_digests)
    tensors.refuse_codes(opened)
    if not opened.is_elastic:
        why = "not an elastic checkpoint"
    elif opened.space.training is None and not all(s.trained for s in opened.space.submodels):
        why = "reordered, but its sizes were never trained"
    else:
        return opened
    raise CheckpointError(f"{opened.path}: {why}: train it first, without `quantize`")


def sizes_of(recipe: Recipe, opened: Checkpoint) -> dict[str, Fields]:
    """The sizes that are trained: those declared, or as many of them as the recipe names.

    Raises:
        ValueError: a size that the parent does not declare so.
    """
    declared: dict[str, Fields] = {n: s.config for n, s in opened.space.sizes.items()}
    if not recipe.says_sizes:
        recipe.check_names(declared)
        return declared
    for name, fields in named_sizes(opened.layout, recipe).items():
        if declared.get(name) != fields:
            known = ", ".join(f"{name} {dict(fields)}" for name, fields in declared.items())
            raise ValueError(f"sizes.{name}: {fields}: {opened.path} declares {known}")
    return {name: declared[name] for name in recipe.sizes}


def coding_of(recipe: Recipe, opened: Checkpoint, sizes: Mapping[str, Fields]) -> Coding:
    """How the parent's matrices become codes.

    Raises:
        ValueError: a pattern that keeps nothing, a size that would cut inside a block.
    """
    assert recipe.quantize is not None
    layout = opened.layout
    stored = {name: tensors.dtype_of(opened, w) for name, w in layout.weights.items()}
    chosen = quantized(layout, recipe.quantize.keep)
    coding = Coding(layout, recipe.quantize.readings, chosen.values(), stored)
    for name, fields in sizes.items():
        coding.check(name, fields)
    return coding


def steps_of(coding: Coding, opened: Checkpoint) -> dict[str, int]:
    """The steps in which axes shrink, as the parent declares and the codes need."""
    return coding.steps({name: axis.multiple_of for name, axis in opened.space.axes.items()})


def space_of(
    recipe: Recipe, opened: Checkpoint, sizes: Mapping[str, Fields], position: Position
) -> ElasticSpace:
    """The parent's declaration, trained further; what was measured on other weights is gone."""
    assert recipe.quantize is not None
    before = opened.space.training
    words = [recipe.quantize.format, *(f"keeping {each}" for each in recipe.quantize.keep)]
    told = f"{recipe.name} for {', '.join(words)}"
    if recipe.quantize.group is not None:
        told += f" in groups of {recipe.quantize.group}"
    if recipe.quantize.bits:
        told += f", read at {' and '.join(map(str, recipe.quantize.bits))} bits"
    training = Training(
        recipe=f"{before.recipe}, then {told}" if before else told,
        steps=position.step + ((before and before.steps) or 0),
        tokens=position.tokens + ((before and before.tokens) or 0),
    )
    submodels = [
        opened.space.sizes[name].model_copy(update={"trained": True, "quality": {}})
        for name in sizes
    ]
    return opened.space.model_copy(
        update={"submodels": submodels, "training": training, "digests": {}}
    )


def beside(opened: Checkpoint) -> dict[str, Callable[[Path], None]]:
    """The parent's router, if it has one."""
    there = (opened.path / ROUTER).exists()
    return {ROUTER: partial(copy_file, opened.path, ROUTER)} if there else {}
