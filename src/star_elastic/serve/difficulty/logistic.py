"""Logistic regression on standardized features, in float64: the same data, the same weights."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from star_elastic.serve.difficulty.file import MOST_DEVIATIONS

# n: requests, f: features, s: sizes
Array = NDArray[np.float64]

_LEAST_SCALE = 1e-6  # a feature that varies less is constant


@dataclass(frozen=True)
class Logistic:
    """One regression per size. `weights` is (f, s), for features less `mean` over `scale`."""

    mean: Array
    scale: Array
    weights: Array
    bias: Array

    def probabilities(self, x_nf: Array) -> Array:
        """Of a good answer, (n, s)."""
        scores = _standardized(x_nf, self.mean, self.scale) @ self.weights + self.bias
        return 1 / (1 + np.exp(-scores.clip(-60, 60)))


def fit_logistic(x_nf: Array, y_ns: Array, l2: float) -> Logistic:
    """Minimize the mean cross-entropy of each size plus `l2` times the sum of squared weights.

    Args:
        y_ns: how good each answer was, 0 to 1; between them it counts as partly good.
        l2: weights shrink with it. The biases hardly do (by 1e-4, lest they grow for ever where
            every answer is good), so that mean probabilities are mean outcomes.
    """
    mean, scale = x_nf.mean(0), x_nf.std(0)
    scale = np.where(scale < _LEAST_SCALE, 1.0, scale)
    z_nf = _standardized(x_nf, mean, scale)
    weights, bias = _minimize(torch.from_numpy(z_nf), torch.from_numpy(y_ns), l2)
    return Logistic(mean, scale, weights.numpy(), bias.numpy())


def _standardized(x_nf: Array, mean: Array, scale: Array) -> Array:
    """As `file.Router` does it."""
    return ((x_nf - mean) / scale).clip(-MOST_DEVIATIONS, MOST_DEVIATIONS)


def _minimize(z_nf: Tensor, y_ns: Tensor, l2: float) -> tuple[Tensor, Tensor]:
    weights = torch.zeros(z_nf.shape[1], y_ns.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(y_ns.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weights, bias], max_iter=200, tolerance_grad=1e-9, line_search_fn="strong_wolfe"
    )
    entropy = torch.nn.BCEWithLogitsLoss()

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = y_ns.shape[1] * entropy(z_nf @ weights + bias, y_ns)
        value = value + l2 * weights.square().sum() + 1e-4 * bias.square().sum()
        value.backward()
        return value

    optimizer.step(loss)  # pyright: ignore[reportArgumentType]
    return weights.detach(), bias.detach()
