"""By cost: the largest size that a request, its key and the whole server can pay for.

Costs are in the unit of `Size.price`. A request is judged by what it may cost at most, its prompt
and all the tokens it asks for; the server charges that when the request begins, and pays back what
was not used when it ends.
"""

import math
from collections.abc import Mapping
from typing import NoReturn

from star_elastic.serve.policy.choose import Allowed, Clock, Load, Refused, Size, Wish


class Bucket:
    """A budget that refills steadily: at most a minute's worth is ever in it."""

    def __init__(self, per_minute: float, clock: Clock) -> None:
        """Raises: ValueError: a budget that is not positive."""
        if not per_minute > 0:
            raise ValueError(f"cost: a budget of {per_minute} per minute is not positive")
        self.per_minute = per_minute
        self._clock, self._last, self._left = clock, clock(), per_minute

    @property
    def left(self) -> float:
        """What may be spent now; below 0 if more was charged than was there."""
        now = self._clock()
        self._left += (now - self._last) / 60 * self.per_minute
        self._left, self._last = min(self._left, self.per_minute), now
        return self._left

    def charge(self, cost: float) -> None:
        """Take so much out; a negative cost gives back."""
        self._left = min(self.left - cost, self.per_minute)

    def seconds_until(self, cost: float) -> int | None:
        """Whole seconds until so much is there, at least 1; None if it never will be."""
        if cost > self.per_minute:
            return None
        return max(1, math.ceil((cost - self.left) / self.per_minute * 60))


class ByCost:
    """Sizes within the request's `max_cost`, its key's budget, and that of everybody together."""

    def __init__(self, keys: Mapping[str, Bucket], everybody: Bucket | None = None) -> None:
        """A key that is not among `keys` has no budget of its own, hence no limit of its own."""
        self._keys, self._everybody = dict(keys), everybody

    def allow(self, wish: Wish, load: Load, sizes: tuple[Size, ...]) -> Allowed:
        """Those that can be paid for.

        Raises:
            Refused: not even the smallest can; with the time until it can, if there is one.
        """
        limits = self._limits(wish)
        if not limits:
            return Allowed(sizes)
        limit, name = min(limits)
        paid = tuple(size for size in sizes if cost_of(size, wish) <= limit)
        if not paid:
            self._refuse(wish, min(sizes, key=lambda size: size.price))
        if len(paid) == len(sizes):
            return Allowed(sizes)
        return Allowed(paid, f"cost: {paid[0].name} is the largest within {name}, {limit:g} left")

    def charge(self, key: str | None, cost: float) -> None:
        """Book a cost, or with a negative one give back, on the key and on everybody."""
        for _, bucket in self._buckets(key):
            bucket.charge(cost)

    def _buckets(self, key: str | None) -> list[tuple[str, Bucket]]:
        own = self._keys.get(key) if key is not None else None
        named = [("the key's budget per minute", own), ("the server's", self._everybody)]
        return [(name, bucket) for name, bucket in named if bucket is not None]

    def _limits(self, wish: Wish) -> list[tuple[float, str]]:
        limits = [(bucket.left, name) for name, bucket in self._buckets(wish.key)]
        return limits if wish.max_cost is None else [*limits, (wish.max_cost, "max_cost")]

    def _refuse(self, wish: Wish, cheapest: Size) -> NoReturn:
        cost = cost_of(cheapest, wish)
        what = f"cost: {cheapest.name} may cost {cost:g}"
        if wish.max_cost is not None and cost > wish.max_cost:
            raise Refused(f"{what}, max_cost is {wish.max_cost:g}")
        waits = {name: b.seconds_until(cost) for name, b in self._buckets(wish.key)}
        for name, seconds in waits.items():
            if seconds is None:
                raise Refused(f"{what}, more than {name} ever holds; ask for fewer tokens")
        seconds = max(each for each in waits.values() if each is not None)
        raise Refused(f"{what}, more than is left of {' or '.join(waits)}", seconds)


def cost_of(size: Size, wish: Wish) -> float:
    """What a request may cost at most at this size."""
    return size.price * (wish.prompt_tokens + wish.max_tokens)
