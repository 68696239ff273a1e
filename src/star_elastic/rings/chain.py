"""The index of rings: which bytes of every tensor a size adds to the next smaller one.

Sizes that include one another are a chain. Of a tensor, a size adds the new columns of the rows
that are there already, then its new rows; a tensor that no smaller size has it adds whole. So the
smallest size (the core) and what every larger one adds are a partition of the parent.

Glossary
    frame     the size in whose rows and bytes a corner is told: the parent, or a size rebuilt
    part      what one size adds to one tensor: no, one or two corners, stored in this order
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from star_elastic.checkpoint import Checkpoint
from star_elastic.corner import Corner, corner_of, without
from star_elastic.dtypes import STORED_ITEMSIZE
from star_elastic.folder import Stored
from star_elastic.layout import Layout, Weight
from star_elastic.packed import SHAPE
from star_elastic.shapes import Sizes, at
from star_elastic.submodel import Submodel

Part = tuple[Corner, ...]


def chain_of(checkpoint: Checkpoint, names: Sequence[str] | None = None) -> list[Submodel]:
    """Named sizes (all, if none are named), the smallest first, the parent last.

    Raises:
        CheckpointError: no such size.
        ValueError: fewer than two; two of which neither includes the other; no parent among them.
    """
    known = checkpoint.space.sizes if names is None else names
    sizes = sorted(map(checkpoint.size, dict.fromkeys(known)), key=lambda size: size.total_params)
    if len(sizes) < 2:
        raise ValueError(f"{checkpoint.path}: rings want two sizes or more, not {len(sizes)}")
    check_chain(checkpoint.layout, sizes)
    return sizes


def check_chain(layout: Layout, sizes: Sequence[Submodel]) -> None:
    """Does each size include the one before, and is the last the whole parent?

    Raises:
        ValueError: naming two sizes and a field, or what the largest lacks.
    """
    for smaller, larger in pairwise(sizes):
        one, other = layout.sizes_of(smaller.config), layout.sizes_of(larger.config)
        if field := _excess(layout, one, other):
            raise ValueError(
                f"sizes {smaller.name} and {larger.name} are no chain: {field} is larger in "
                f"{smaller.name}"
            )
        if one == other:
            raise ValueError(f"sizes {smaller.name} and {larger.name} are the same")
    if field := _excess(layout, layout.sizes, layout.sizes_of(sizes[-1].config)):
        raise ValueError(f"size {sizes[-1].name} is not the whole parent: its {field} is smaller")


def partition(checkpoint: Checkpoint, chain: Sequence[Sizes]) -> dict[str, list[Part]]:
    """What each size adds to every stored tensor of the last one, which is also the frame.

    Tensors that no size uses, and those that tell a shape (`weight_shape`: their values differ from
    size to size), belong to the parent alone: they are whole in its part, and nowhere else.

    Raises:
        ValueError: a cut inside a block of codes that share a byte or a scale.
    """
    frame = chain[-1]
    is_parent = frame == checkpoint.layout.sizes
    held = [
        {weight.name for _, weight in checkpoint.layout.kept(child, checkpoint.weights)}
        for child in chain
    ]
    found: dict[str, list[Part]] = {}
    for name, stored in checkpoint.stored.items():
        weight = checkpoint.weights.get(name)
        if weight is None or name.endswith(SHAPE):
            if is_parent or name in held[-1]:
                last = _whole(stored) if is_parent else ()
                found[name] = [*[()] * (len(chain) - 1), last]
        elif name in held[-1]:
            there = [child for child, names in zip(chain, held, strict=True) if name in names]
            absent: list[Part] = [()] * (len(chain) - len(there))
            found[name] = absent + _parts(weight, STORED_ITEMSIZE[stored.dtype], frame, there)
    return found


def extents(checkpoint: Checkpoint, parts: Mapping[str, list[Part]], number: int) -> dict[str, int]:
    """Elements of each tensor of a ring: what the size of this number adds, in stored elements."""
    added = {name: sum(c.bytes for c in parts[name][number]) for name in parts}
    return {
        name: count // STORED_ITEMSIZE[checkpoint.stored[name].dtype]
        for name, count in added.items()
        if count
    }


def _parts(weight: Weight, itemsize: int, frame: Sizes, chain: Sequence[Sizes]) -> list[Part]:
    corners = [corner_of(weight, itemsize, frame, child) for child in chain]
    parts: list[Part] = [(corners[0],)]
    for smaller, larger in pairwise(corners):
        columns = tuple(without(larger.columns, smaller.columns))
        rows = tuple(without(larger.rows, smaller.rows))
        both = (replace(larger, rows=smaller.rows, columns=columns), replace(larger, rows=rows))
        parts.append(tuple(corner for corner in both if corner.bytes))
    return parts


def _whole(stored: Stored) -> Part:
    size = stored.end - stored.start
    return (Corner(1, ((0, size),), ((0, 1),)),) if size else ()


def _excess(layout: Layout, one: Sizes, other: Sizes) -> str | None:
    """A field (or a ratio of fields) that is larger in the one than in the other."""
    for layer in range(len(layout.blocks)):
        here, there = at(one, layer), at(other, layer)
        for symbol, value in here.items():
            if isinstance(value, int) and value > there[symbol]:
                return "num_hidden_layers" if symbol == "layer" else symbol
    return None
