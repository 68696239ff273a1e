"""The grammar of shapes and the index algebra, against numpy by brute force."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from star_elastic.shapes import Dim, Shape, cuts, narrow, parse, runs, width

SYMBOLS = "abcd"


@st.composite
def dims(draw: st.DrawFn) -> Dim:
    segment = st.lists(st.sampled_from(SYMBOLS), min_size=1, max_size=3).map(tuple)
    return tuple(draw(st.lists(segment, min_size=1, max_size=3)))


@st.composite
def nested_sizes(draw: st.DrawFn, depth: int) -> list[dict[str, int]]:
    """Sizes, each within the one before."""
    sizes = [{symbol: draw(st.integers(1, 4)) for symbol in SYMBOLS}]
    for _ in range(depth - 1):
        sizes.append({s: draw(st.integers(1, most)) for s, most in sizes[-1].items()})
    return sizes


def brute_force(dim: Dim, parent: dict[str, int], child: dict[str, int]) -> list[int]:
    """Flat indices kept, by cutting a numpy array of all indices."""
    kept: list[int] = []
    start = 0
    for segment in dim:
        shape = [parent[symbol] for symbol in segment]
        corner = tuple(slice(child[symbol]) for symbol in segment)
        block = np.arange(start, start + math.prod(shape)).reshape(shape)
        kept += block[corner].flatten().tolist()
        start += math.prod(shape)
    return kept


@settings(max_examples=300, deadline=None)
@given(dim=dims(), sizes=nested_sizes(2))
def test_runs_are_the_leading_corners(dim: Dim, sizes: list[dict[str, int]]) -> None:
    parent, child = sizes
    found = runs(dim, parent, child)
    indices = [index for start, length in found for index in range(start, start + length)]
    assert indices == brute_force(dim, parent, child)
    assert width(dim, child) == len(indices)
    for (start, length), (following, _) in zip(found, found[1:], strict=False):
        assert start + length < following  # merged: neighbours never touch


shapes = st.lists(dims(), min_size=1, max_size=2).map(tuple)


def extent(shape: Shape, sizes: dict[str, int]) -> tuple[int, ...]:
    return tuple(width(dim, sizes) for dim in shape)


def take(tensor: Tensor, shape: Shape, parent: dict[str, int], child: dict[str, int]) -> Tensor:
    return narrow(tensor, cuts(shape, parent, child))


def numbered(shape: Shape, sizes: dict[str, int]) -> Tensor:
    """A tensor in which every element is its own place."""
    return torch.arange(math.prod(extent(shape, sizes))).view(extent(shape, sizes))


@settings(max_examples=200, deadline=None)
@given(shape=shapes, sizes=nested_sizes(2))
def test_take_is_the_brute_force_index(shape: Shape, sizes: list[dict[str, int]]) -> None:
    parent, child = sizes
    whole = numbered(shape, parent)
    index = np.ix_(*(brute_force(dim, parent, child) for dim in shape))
    part = take(whole, shape, parent, child)
    assert part.tolist() == whole.numpy()[index].tolist()
    is_view = part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    assert is_view == all(len(runs(dim, parent, child)) == 1 for dim in shape)


@settings(max_examples=200, deadline=None)
@given(shape=shapes, sizes=nested_sizes(3))
def test_cuts_nest(shape: Shape, sizes: list[dict[str, int]]) -> None:
    parent, middle, child = sizes
    whole = numbered(shape, parent)
    twice = take(take(whole, shape, parent, middle), shape, middle, child)
    assert torch.equal(twice, take(whole, shape, parent, child))


@settings(max_examples=50, deadline=None)
@given(shape=shapes, sizes=nested_sizes(2))
def test_gradients_of_a_part_flow_into_the_whole(shape: Shape, sizes: list[dict[str, int]]) -> None:
    parent, child = sizes
    whole = nn.Parameter(torch.ones(extent(shape, parent)))
    part = take(whole, shape, parent, child)
    seeds = torch.arange(1.0, part.numel() + 1).view(part.shape)
    part.backward(seeds)
    expected = np.zeros(extent(shape, parent))
    expected[np.ix_(*(brute_force(dim, parent, child) for dim in shape))] = seeds.numpy()
    assert whole.grad is not None and whole.grad.tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("a", ((("a",),),)),
        ("a, b", ((("a",),), (("b",),))),
        ("a*b + c, d if e", ((("a", "b"), ("c",)), (("d",),))),
        ("a + b, 1, c", ((("a",), ("b",)), (("1",),), (("c",),))),
    ],
)
def test_parse(text: str, shape: Shape) -> None:
    assert parse(text) == shape


def test_numbers_are_sizes() -> None:
    assert extent(parse("a*2 + 3, 1"), {"a": 5}) == (13, 1)
