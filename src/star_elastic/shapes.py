"""The grammar of named shapes, and the one index: which part of a tensor a submodel keeps.

Evaluate a shape under the parent's sizes and under a submodel's smaller ones: the submodel keeps
the leading corner of every factor of every segment.

Glossary
    symbol    a config field (`hidden_size`), or one derived from fields (`queries`)
    segment   symbols multiplied, outermost first: `n_groups*mamba_heads*mamba_head_dim`
    dim       segments concatenated: `z + x + B + C + dt`
    sizes     {symbol: number}; tensors work as numbers, so that counts can be differentiated;
              a list holds one number a layer (`at` picks)
    run       (start, length) of consecutive indices kept on one dimension
"""

from collections.abc import Iterable, Mapping
from math import prod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Segment = tuple[str, ...]
Dim = tuple[Segment, ...]
Shape = tuple[Dim, ...]
Sizes = Mapping[str, Any]
Run = tuple[int, int]


def parse(text: str) -> Shape:
    """`"2*a + b, c"` as (((2, a), (b,)), ((c,),)); what follows ` if ` is left to the caller."""
    text = text.split(" if ")[0]
    return tuple(
        tuple(tuple(s.strip() for s in segment.split("*")) for segment in dim.split("+"))
        for dim in text.split(",")
    )


def width(dim: Dim, sizes: Sizes) -> Any:
    """The size of one dimension: a sum of products; differentiable if `sizes` holds tensors."""
    return sum(prod(_value(symbol, sizes) for symbol in segment) for segment in dim)


def runs(dim: Dim, parent: Sizes, child: Sizes) -> list[Run]:
    """The indices of the parent's dimension that the child keeps, as merged (start, length)."""
    kept: list[Run] = []
    start = 0
    for segment in dim:
        outer = [_value(symbol, parent) for symbol in segment]
        inner = [_value(symbol, child) for symbol in segment]
        for offset, length in _corner(outer, inner):
            _append(kept, (start + offset, length))
        start += prod(outer)
    return kept


def cuts(
    shape: Shape, parent: Sizes, child: Sizes, blocks: tuple[int, ...] = ()
) -> list[tuple[int, list[Run]]]:
    """The dimensions that a child shortens, and the runs it keeps of each.

    Args:
        blocks: per dimension, how many elements one stored index holds (two 4-bit codes in a byte,
            16 elements under one scale); runs are told in stored indices.

    Raises:
        ValueError: a cut inside a block.
    """
    found = []
    for position, dim in enumerate(shape):
        block = blocks[position] if blocks else 1
        kept, whole = runs(dim, parent, child), width(dim, parent)
        if kept != [(0, whole)]:
            found.append((position, [_blocked(run, block) for run in kept]))
    return found


def narrow(tensor: "Tensor", found: Iterable[tuple[int, list[Run]]]) -> "Tensor":
    """What `cuts` leaves of a tensor: a view wherever one run suffices, else a copy.

    Differentiable: gradients of the part flow into the whole.
    """
    for position, kept in found:
        pieces = [tensor.narrow(position, *run) for run in kept]
        tensor = pieces[0] if len(pieces) == 1 else _joined(pieces, position)
    return tensor


def at(sizes: Sizes, layer: int | None) -> Sizes:
    """The sizes inside one layer of the parent: of symbols given per layer, that layer's number."""
    if layer is None:
        return sizes
    return {s: value[layer] if isinstance(value, list) else value for s, value in sizes.items()}


def _joined(pieces: "list[Tensor]", position: int) -> "Tensor":
    import torch  # here only: cutting files needs this module and no torch

    return torch.cat(pieces, position)


def _value(symbol: str, sizes: Sizes) -> Any:
    return int(symbol) if symbol.isdigit() else sizes[symbol]


def _corner(outer: list[int], inner: list[int]) -> list[Run]:
    """Leading corner `inner` of a row-major block `outer`, as runs of the flat index."""
    if outer == inner:
        return [(0, prod(outer))]
    stride = prod(outer[1:])
    if outer[1:] == inner[1:]:
        return [(0, inner[0] * stride)]
    nested = _corner(outer[1:], inner[1:])
    return [(unit * stride + start, length) for unit in range(inner[0]) for start, length in nested]


def _blocked(run: Run, block: int) -> Run:
    start, length = run
    if start % block or length % block:
        raise ValueError(f"elements {start} to {start + length} do not fill blocks of {block}")
    return start // block, length // block


def _append(kept: list[Run], run: Run) -> None:
    if kept and sum(kept[-1]) == run[0]:
        kept[-1] = (kept[-1][0], kept[-1][1] + run[1])
    elif run[1]:
        kept.append(run)
