"""From outcomes to a model of difficulty, judged on requests that it was not fitted on.

Part of the requests is held out and only measures. On the others chances are predicted crosswise,
each by a model that did not see the request, and these choose the thresholds and, for each share of
the cost, whether a probe is worth what it costs. The model itself is then fitted on all of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from star_elastic.serve.difficulty.curve import auc, calibration_error, measure
from star_elastic.serve.difficulty.features import NAMES
from star_elastic.serve.difficulty.file import (
    Difficulty,
    Feature,
    Interval,
    Provenance,
    Router,
    Setting,
)
from star_elastic.serve.difficulty.logistic import Logistic, fit_logistic
from star_elastic.serve.difficulty.outcomes import Outcomes
from star_elastic.serve.difficulty.thresholds import choose, difficulty_of, thresholds

# n: requests, s: sizes, smallest first
Array = NDArray[np.float64]

LEAST_REQUESTS = 100
LEAST_OF_A_KIND = 10  # requests that gain from the largest size, and that do not
_FOLDS = 5
_DEAREST = 0.98  # share of the cost at the smallest size, above which there is nothing to save
_SETTINGS = 9  # evenly between the smallest size's cost and the largest's


@dataclass(frozen=True)
class _Fitted:
    """A router, and the chances it tells: `crosswise_ns` by models that had not seen them."""

    names: list[str]
    model: Logistic
    fitted_ns: Array
    crosswise_ns: Array
    held_out_ns: Array


def fit(
    outcomes: Outcomes,
    probe_tokens: Sequence[int],
    checkpoint: str = "",
    seed: int = 0,
    held_out: float = 0.3,
    l2: float = 1e-3,
    names: Sequence[str] = NAMES,
) -> Difficulty:
    """Fit routers for these lengths of the probe (0: the prompt alone), and measure them.

    Args:
        held_out: share of the requests that only measures.
        names: features to use, of those that there are.

    Raises:
        ValueError: too few requests, hardly any that gain from the largest size or that do not, or
            a smallest size that is no cheaper.
    """
    fitting, measuring = split(outcomes, held_out, seed)
    _check(outcomes, fitting)
    fitted = {k: _fit(fitting, measuring, k, l2, names) for k in sorted(set(probe_tokens))}
    gained = measuring.gained
    small_n = measuring.quality_ns[:, 0]
    told = {k: each.held_out_ns for k, each in fitted.items()}
    return Difficulty(
        sizes=list(outcomes.sizes),
        routers=[_router(k, each) for k, each in fitted.items()],
        table=_table(fitting, measuring, fitted, seed),
        provenance=Provenance(
            checkpoint=checkpoint,
            fitted=len(fitting),
            held_out=len(measuring),
            gained=int(outcomes.gained.sum()),
            seed=seed,
            auc={str(k): auc(difficulty_of(c), gained, seed) for k, c in told.items()},
            calibration_error={
                str(k): calibration_error(c[:, 0], small_n) for k, c in told.items()
            },
        ),
    )


def split(outcomes: Outcomes, held_out: float, seed: int) -> tuple[Outcomes, Outcomes]:
    """The requests to fit on, in random order, and a share of them to measure on."""
    places = np.random.default_rng(seed).permutation(len(outcomes)).tolist()
    kept = round(held_out * len(outcomes))
    return outcomes.at(places[kept:]), outcomes.at(places[:kept])


def verdict(difficulty: Difficulty) -> str:
    """In one sentence, whether it is above random mixing."""
    shares = {"above": [], "below": [], "undecided": []}
    for setting in difficulty.table:
        shares[_side(setting.difference)].append(f"{100 * setting.share:.0f} %")
    if len(shares["above"]) == len(difficulty.table):
        return "above random mixing at the same cost at every point"
    parts = ["NOT shown to beat random mixing at the same cost at every point"]
    words = {"above": "above", "undecided": "not told apart from it", "below": "below it"}
    parts += [f"{words[side]} at {', '.join(found)}" for side, found in shares.items() if found]
    return "; ".join(parts)


def _side(difference: Interval) -> str:
    if difference.low > 0:
        return "above"
    return "below" if difference.high < 0 else "undecided"


def check_count(requests: int) -> None:
    """Raises: ValueError: too few requests to fit on, whatever came of them."""
    if requests < LEAST_REQUESTS:
        least = f"it takes {LEAST_REQUESTS} at least"
        raise ValueError(f"difficulty: {requests} graded requests; {least}")


def _check(outcomes: Outcomes, fitting: Outcomes) -> None:
    count, gained = len(outcomes), int(outcomes.gained.sum())
    small, large = outcomes.sizes[0], outcomes.sizes[-1]
    check_count(count)
    for number, what in ((gained, "are better"), (count - gained, "are not better")):
        if number < LEAST_OF_A_KIND:
            raise ValueError(
                f"difficulty: {number} of {count} answers of {large} {what} than those of {small}; "
                f"it takes {LEAST_OF_A_KIND} at least: nothing to learn a router from"
            )
    if (share := fitting.costs()[:, 0].mean()) > _DEAREST:
        raise ValueError(f"difficulty: {small} costs {share:.2f} times what {large} costs")


def _fit(
    fitting: Outcomes, measuring: Outcomes, probe_tokens: int, l2: float, names: Sequence[str]
) -> _Fitted:
    used, x_nf = fitting.features(probe_tokens, names)
    _, measured_nf = measuring.features(probe_tokens, names)
    y_ns = fitting.quality_ns
    crosswise_ns = np.empty_like(y_ns)
    folds = np.arange(len(y_ns)) % _FOLDS  # they are in random order
    for fold in range(_FOLDS):
        model = fit_logistic(x_nf[folds != fold], y_ns[folds != fold], l2)
        crosswise_ns[folds == fold] = model.probabilities(x_nf[folds == fold])
    model = fit_logistic(x_nf, y_ns, l2)
    told = model.probabilities(x_nf), crosswise_ns, model.probabilities(measured_nf)
    return _Fitted(used, model, *told)


def _table(
    fitting: Outcomes, measuring: Outcomes, fitted: Mapping[int, _Fitted], seed: int
) -> list[Setting]:
    least = fitting.costs()[:, 0].mean()
    steps = range(1, _SETTINGS + 1)
    shares = [round(least + (1 - least) * step / (_SETTINGS + 1), 4) for step in steps]
    best = [_best(fitting, fitted, share) for share in shares]
    chosen = [choose(difficulty_of(fitted[k].held_out_ns), found) for k, found in best]
    points = measure(measuring, chosen, [k for k, _ in best], seed)
    return [
        Setting(share=share, probe_tokens=k, thresholds=found, **vars(point))
        for share, (k, found), point in zip(shares, best, points, strict=True)
    ]


def _best(
    fitting: Outcomes, fitted: Mapping[int, _Fitted], share: float
) -> tuple[int, list[float]]:
    """The shortest probe that no longer one clearly beats within a share, and the thresholds."""
    rows, best, best_n = np.arange(len(fitting)), 0, None
    for k, each in sorted(fitted.items()):
        found = thresholds(each.crosswise_ns, fitting.costs(k), share)
        good_n = fitting.quality_ns[rows, choose(difficulty_of(each.crosswise_ns), found)]
        if best_n is None or _better(good_n, best_n):
            best, best_n = k, good_n
    # of the model itself: chances of several models do not make one scale, and costs would drift
    return best, thresholds(fitted[best].fitted_ns, fitting.costs(best), share)


def _better(one_n: Array, other_n: Array) -> bool:
    """By more than the standard error: what is cheaper and simpler stays until beaten."""
    apart_n = one_n - other_n
    return bool(apart_n.mean() > apart_n.std() / len(apart_n) ** 0.5)


def _router(probe_tokens: int, fitted: _Fitted) -> Router:
    model = fitted.model
    columns = zip(fitted.names, model.mean, model.scale, model.weights, strict=True)
    return Router(
        probe_tokens=probe_tokens,
        bias=model.bias.tolist(),
        features=[
            Feature(name=name, mean=float(mean), scale=float(scale), weights=weights.tolist())
            for name, mean, scale, weights in columns
        ],
    )
