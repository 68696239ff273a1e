"""Thresholds of difficulty for a share of the cost.

Requests in order of difficulty go to sizes in order: where each begins is a cut. Costs are in units
of what the largest size costs a request on average.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from star_elastic.serve.difficulty.file import NEVER

# n: requests, s: sizes, smallest first
Array = NDArray[np.float64]
Indices = NDArray[np.intp]


def difficulty_of(chances_ns: Array) -> Array:
    """What the largest size adds to the smallest one's chance of a good answer, (n)."""
    return chances_ns[:, -1] - chances_ns[:, 0]


def choose(difficulty_n: Array, thresholds: Sequence[float]) -> Indices:
    """The size of each request: as many up as there are thresholds at or below its difficulty."""
    return np.searchsorted(np.asarray(thresholds), difficulty_n, side="right")


def thresholds(chances_ns: Array, cost_ns: Array, share: float) -> list[float]:
    """The least difficulty of each size above the smallest, so that costs stay within a share.

    Cuts are the best by the chances for some price of a unit of cost, in good answers: the lowest
    price that keeps to the share. From there they go as far as they may towards those of the
    highest price that does not, since prices can jump over a share. Should the smallest size alone
    cost more, it answers all.
    """
    difficulty_n = difficulty_of(chances_ns)
    order = difficulty_n.argsort(kind="stable")
    sorted_n, chances_ns, cost_ns = difficulty_n[order], chances_ns[order], cost_ns[order]
    rows = np.arange(len(sorted_n))

    def within(found: Indices) -> bool:
        chosen_n = choose(sorted_n, _at_cuts(sorted_n, found))
        return bool(cost_ns[rows, chosen_n].mean() <= share)

    below = np.full(chances_ns.shape[1] - 1, len(sorted_n))
    above = np.zeros_like(below)
    low, high = math.log(1e-6), math.log(1e6)
    for _ in range(40):
        tried = cuts(chances_ns, cost_ns, math.exp((low + high) / 2))
        if within(tried):
            high, below = (low + high) / 2, tried
        else:
            low, above = (low + high) / 2, tried
    if high > math.log(2e-6):  # else even what costs nothing keeps to the share
        below = _towards(below, above, within)
    return _at_cuts(sorted_n, below)


def _towards(below: Indices, above: Indices, within: Callable[[Indices], bool]) -> Indices:
    found, left, right = below, 0.0, 1.0
    for _ in range(20):
        middle = (left + right) / 2
        tried = np.rint(below + middle * (above - below)).astype(np.intp)
        if within(tried):
            found, left = tried, middle
        else:
            right = middle
    return found


def cuts(chances_ns: Array, cost_ns: Array, price: float) -> Indices:
    """How many of the requests, which are in order, come before each size above the smallest.

    Of all ways to cut, the one with the most expected good answers less `price` times their cost.
    """
    worth_ns = np.pad((chances_ns - price * cost_ns).cumsum(0), ((1, 0), (0, 0)))
    best: list[Array] = []  # best[k][i]: of cuts up to the k-th, that one being i
    for size in range(1, worth_ns.shape[1]):
        before = np.maximum.accumulate(best[-1]) if best else 0.0
        best.append(before + worth_ns[:, size - 1] - worth_ns[:, size])
    found, end = [], len(worth_ns)
    for values in reversed(best):
        cut = int(values[:end].argmax())
        found.insert(0, cut)
        end = cut + 1
    return np.array(found, np.intp)


def _at_cuts(sorted_n: Array, found: Indices) -> list[float]:
    """The difficulties half-way between the neighbours of each cut."""
    ends = {0: -NEVER, len(sorted_n): NEVER}
    return [
        ends[cut] if cut in ends else float(sorted_n[cut - 1] + sorted_n[cut]) / 2
        for cut in found.tolist()
    ]
