"""Accuracy against cost on requests that nothing was fitted on, and how far chance explains it.

The baseline is random mixing: every request goes to a size drawn by chance. At a given cost it
reaches the best that any chances reach there. Intervals are bootstraps over requests, in which
router and baseline are measured on the same draws.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from star_elastic.serve.difficulty.file import Interval
from star_elastic.serve.difficulty.outcomes import Outcomes
from star_elastic.serve.difficulty.thresholds import Indices

# n: requests, s: sizes, smallest first, r: draws
Array = NDArray[np.float64]

RESAMPLES = 2000


@dataclass(frozen=True)
class Point:
    """One way to route, measured. `random` is the baseline at the same cost share."""

    cost_share: float
    accuracy: float
    random: float
    difference: Interval


def measure(
    outcomes: Outcomes, chosen: Sequence[Indices], probe_tokens: Sequence[int], seed: int = 0
) -> list[Point]:
    """Several ways to route the same requests: the size of each, and the probe it took."""
    rows = np.arange(len(outcomes))
    pure_ns = outcomes.costs()
    columns = [outcomes.quality_ns, pure_ns]
    for sizes_n, probe in zip(chosen, probe_tokens, strict=True):
        routed_ns = outcomes.costs(probe)
        pair = [outcomes.quality_ns[rows, sizes_n], routed_ns[rows, sizes_n]]
        columns.append(np.stack(pair, 1))
    means_rc = resampled(np.concatenate(columns, 1), seed)
    count = len(outcomes.sizes)
    accuracy_rs, cost_rs = means_rc[:, :count], means_rc[:, count : 2 * count]
    points = []
    for start in range(2 * count, means_rc.shape[1], 2):
        accuracy_r, cost_r = means_rc[:, start], means_rc[:, start + 1]
        random_r = mixed(accuracy_rs, cost_rs, cost_r)
        points.append(
            Point(
                float(cost_r[0] / cost_rs[0, -1]),
                float(accuracy_r[0]),
                float(random_r[0]),
                interval(accuracy_r - random_r),
            )
        )
    return points


def resampled(values_nc: Array, seed: int, draws: int = RESAMPLES) -> Array:
    """Means of columns: of the requests as they are, then of so many draws of as many of them."""
    generator = np.random.default_rng(seed)
    count = len(values_nc)
    means = [values_nc.mean(0)]
    for _ in range(draws):
        weights = np.bincount(generator.integers(count, size=count), minlength=count)
        means.append(weights @ values_nc / count)
    return np.array(means)


def interval(values_r: Array) -> Interval:
    """Of the value as it is (the first one) and of resampled ones."""
    low, high = np.quantile(values_r[1:], [0.025, 0.975])
    return Interval(low=float(low), mean=float(values_r[0]), high=float(high))


def mixed(accuracy_rs: Array, cost_rs: Array, at_r: Array) -> Array:
    """The best accuracy of sizes mixed at random within a cost; the cheapest's if all cost more."""
    sizes = range(accuracy_rs.shape[1])
    cheapest = cost_rs.argmin(1)[:, None]
    best_r = np.take_along_axis(accuracy_rs, cheapest, 1)[:, 0]
    for one in sizes:
        within = cost_rs[:, one] <= at_r
        best_r = np.where(within, np.maximum(best_r, accuracy_rs[:, one]), best_r)
        for other in sizes:
            apart_r = cost_rs[:, other] - cost_rs[:, one]
            share_r = (at_r - cost_rs[:, one]) / np.where(apart_r > 0, apart_r, 1.0)
            both_r = accuracy_rs[:, one] + share_r * (accuracy_rs[:, other] - accuracy_rs[:, one])
            between = within & (apart_r > 0) & (share_r <= 1)
            best_r = np.where(between, np.maximum(best_r, both_r), best_r)
    return best_r


def auc(scores_n: Array, gained_n: NDArray[np.bool_], seed: int = 0) -> Interval:
    """The chance that of two requests, of which one gained, that one has the higher score.

    Ties count half; 0.5 where none gained, or all did.
    """
    generator = np.random.default_rng(seed)
    count = len(scores_n)
    draws = [np.arange(count), *(generator.integers(count, size=(RESAMPLES // 4, count)))]
    return interval(np.array([_auc(scores_n[rows], gained_n[rows]) for rows in draws]))


def _auc(scores_n: Array, gained_n: NDArray[np.bool_]) -> float:
    with_gain, without = scores_n[gained_n], np.sort(scores_n[~gained_n])
    if not len(with_gain) or not len(without):
        return 0.5
    below = np.searchsorted(without, with_gain, "left") + np.searchsorted(
        without, with_gain, "right"
    )
    return float(below.mean() / 2 / len(without))


def calibration_error(chances_n: Array, quality_n: Array, bins: int = 10) -> float:
    """Mean distance of predicted from measured accuracy, over bins of as many requests each."""
    order = chances_n.argsort(kind="stable")
    parts = [part for part in np.array_split(order, bins) if len(part)]
    apart = [abs(chances_n[p].mean() - quality_n[p].mean()) * len(p) for p in parts]
    return float(sum(apart) / len(chances_n))
