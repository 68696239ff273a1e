"""By quality: valuable requests to the large size, routine ones to the small."""

from collections.abc import Mapping

from star_elastic.serve.policy.choose import Allowed, Load, Refused, Size, Wish


class ByQuality:
    """A name of quality stands for the largest size it allows.

    A request asks by name (`elastic.quality`, or a header); its API key's tier is the most it may
    have. Of the two the smaller counts; where neither is said, nothing is.
    """

    def __init__(self, largest: Mapping[str, Size]) -> None:
        """
        Args:
            largest: quality or tier -> the largest size it may have.
        """
        self._largest = dict(largest)

    def allow(self, wish: Wish, load: Load, sizes: tuple[Size, ...]) -> Allowed:
        """Those up to the cap.

        Raises:
            Refused: an unknown quality or tier, or all sizes (a pinned one, say) are above the cap.
        """
        said = {"quality": wish.quality, "tier": wish.tier}
        caps = [self._cap(kind, name) for kind, name in said.items() if name is not None]
        if not caps:
            return Allowed(sizes)
        cap, why = min(caps, key=lambda each: each[0].active_params)
        left = tuple(size for size in sizes if size.active_params <= cap.active_params)
        if not left:
            raise Refused(f"{why}, and of the sizes left the smallest is {sizes[-1].name}")
        return Allowed(left, why)

    def _cap(self, kind: str, name: str) -> tuple[Size, str]:
        if name not in self._largest:
            known = ", ".join(self._largest)
            raise Refused(f"{kind} {name[:80]!r} is unknown; known are {known}")
        return self._largest[name], f"{kind}: {name} allows {self._largest[name].name} at most"
