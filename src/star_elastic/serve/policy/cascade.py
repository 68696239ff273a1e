"""Cascade: the smallest size answers first, a larger one if that answer is not sure of itself."""

import math
from collections.abc import Sequence

from star_elastic.serve.policy.choose import Allowed, Load, Refused, Size, Wish


class Cascade:
    """Put it last: it starts at the smallest size the others allow, and climbs one at a time.

    It has no say where one size only is allowed, as under a pin.
    """

    def __init__(self, below: float) -> None:
        """
        Args:
            below: the confidence under which a larger size is asked; see `confidence`.

        Raises:
            ValueError: it is not between 0 and 1.
        """
        if not 0 < below < 1:
            raise ValueError(f"cascade: a confidence of {below} is not between 0 and 1")
        self._below = below

    def allow(self, wish: Wish, load: Load, sizes: tuple[Size, ...]) -> Allowed:
        """The smallest, or the next above the one that was not sure.

        Raises:
            Refused: no larger size is allowed now; the caller has an answer already.
        """
        if wish.after is None:
            if len(sizes) == 1:
                return Allowed(sizes)
            first = sizes[-1:]
            return Allowed(first, f"cascade: {first[0].name} answers first", self._below)
        names = [size.name for size in sizes]
        above = sizes[: names.index(wish.after)] if wish.after in names else ()
        if not above:
            raise Refused(f"cascade: no size above {wish.after[:80]} is allowed")
        why = f"cascade: {wish.after} was not sure"
        return Allowed(above[-1:], why, self._below if len(above) > 1 else None)


def confidence(logprobs: Sequence[float]) -> float:
    """Of an answer: the geometric mean of its tokens' probabilities; 0 of an empty one."""
    return math.exp(sum(logprobs) / len(logprobs)) if logprobs else 0.0
