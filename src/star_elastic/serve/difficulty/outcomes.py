"""What came of requests at every size: how good the answers were, and what they cost."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from star_elastic.serve.difficulty.features import NAMES, PROBE, Probe, features

# n: requests, f: features, s: sizes, smallest first
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Outcomes:
    """Requests answered by all sizes.

    Attributes:
        sizes: names, smallest first.
        prices: of a token, in any unit, such as the active parameters.
        probes: of the smallest size; empty where none is wanted.
        quality_ns: of the answers, 0 to 1.
        tokens_ns: of the answers.
    """

    sizes: tuple[str, ...]
    prices: tuple[float, ...]
    texts: Sequence[str]
    prompt_tokens: Sequence[int]
    probes: Sequence[Probe]
    quality_ns: Array
    tokens_ns: Array

    def __len__(self) -> int:
        return len(self.texts)

    def at(self, places: Sequence[int]) -> "Outcomes":
        """Some of the requests."""
        rows = list(places)
        return Outcomes(
            self.sizes,
            self.prices,
            [self.texts[n] for n in rows],
            [self.prompt_tokens[n] for n in rows],
            [self.probes[n] for n in rows],
            self.quality_ns[rows],
            self.tokens_ns[rows],
        )

    def costs(self, probe_tokens: int = 0) -> Array:
        """Of every request at every size, (n, s), the largest size's mean being 1.

        A probe begins the smallest size's own answer, so there it is free; at the others it costs
        the smallest size's reading of the prompt and so many of its tokens.
        """
        prompts_n1 = np.asarray(self.prompt_tokens, np.float64)[:, None]
        cost_ns = np.asarray(self.prices) * (prompts_n1 + self.tokens_ns)
        whole = cost_ns[:, -1].mean()
        if probe_tokens:
            probed_n1 = prompts_n1 + np.minimum(probe_tokens, self.tokens_ns[:, :1])
            cost_ns[:, 1:] += self.prices[0] * probed_n1
        return cost_ns / whole

    @property
    def gained(self) -> NDArray[np.bool_]:
        """Whether the largest size did better than the smallest, (n)."""
        return self.quality_ns[:, -1] > self.quality_ns[:, 0]

    def features(self, probe_tokens: int, names: Sequence[str] = NAMES) -> tuple[list[str], Array]:
        """The features that so long a probe allows, and their values (n, f)."""
        used = [name for name in names if probe_tokens or name not in PROBE]
        known = [
            features(text, tokens, probe[:probe_tokens])
            for text, tokens, probe in zip(self.texts, self.prompt_tokens, self.probes, strict=True)
        ]
        return used, np.array([[each[name] for name in used] for each in known])
