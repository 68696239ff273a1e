"""By difficulty: routine requests to the small size, those that gain from a larger one to it."""

from collections.abc import Mapping

from star_elastic.serve.policy.choose import Allowed, Load, Size, Wish


class ByDifficulty:
    """A larger size answers only from its threshold of difficulty on.

    Difficulty is what `serve.difficulty` tells of a request: the chance, -1 to 1, that the largest
    size's answer is good where the smallest's is not. A request of which nobody told it, and one
    for which a single size is left, as under a pin, are left alone.
    """

    def __init__(self, thresholds: Mapping[str, float]) -> None:
        """
        Args:
            thresholds: a size's name -> the least difficulty it answers, as of
                `Difficulty.thresholds` for a share of the cost. Other sizes answer any.

        Raises:
            ValueError: a threshold that is no number.
        """
        for name, least in thresholds.items():
            if least != least:
                raise ValueError(f"difficulty: threshold {least} of size {name} is no number")
        self._thresholds = dict(thresholds)

    def allow(self, wish: Wish, load: Load, sizes: tuple[Size, ...]) -> Allowed:
        """The sizes whose threshold it reaches; the smallest if it reaches none."""
        if wish.difficulty is None or len(sizes) == 1:
            return Allowed(sizes)
        left = tuple(size for size in sizes if self._worth(size, wish.difficulty)) or sizes[-1:]
        if len(left) == len(sizes):
            return Allowed(sizes)
        return Allowed(left, f"difficulty: {wish.difficulty:.2f} allows {left[0].name} at most")

    def _worth(self, size: Size, difficulty: float) -> bool:
        least = self._thresholds.get(size.name)
        return least is None or difficulty >= least
