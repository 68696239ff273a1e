"""The interface of a policy, and the list of them that chooses a request's size.

A policy is given the sizes that the ones before it left, and returns those that it allows, at least
one, with a reason; or it refuses the request. Of what is left at the end the largest size answers.
So policies combine in any order, none can undo another, and a pin is only the narrowest of them:
the policies after it see one size, and can take it or refuse.

Nothing here reads a clock, draws a number or waits: the same wishes, loads and ticks of the clock
that was handed in give the same choices.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

Clock = Callable[[], float]  # seconds, never going back


@dataclass(frozen=True, slots=True)
class Size:
    """A size that serves now. `price` is what one token of it costs.

    Unless the operator says otherwise that is its active parameters in billions, so that 1,000
    tokens of a size with 2.5e9 active parameters cost 2,500.
    """

    name: str
    active_params: int
    price: float = math.nan

    def __post_init__(self) -> None:
        """Raises: ValueError: a negative price."""
        if math.isnan(self.price):
            object.__setattr__(self, "price", self.active_params / 1e9)
        if self.price < 0:
            raise ValueError(f"size {self.name}: price {self.price} is negative")


@dataclass(frozen=True, slots=True)
class Wish:
    """What a request says, and what is known of who sent it; None where nothing was said."""

    prompt_tokens: int = 0
    max_tokens: int = 0  # of all answers together
    size: str | None = None
    max_latency_ms: float | None = None  # from its arrival to its last token
    max_cost: float | None = None  # see `Size.price`
    quality: str | None = None
    tier: str | None = None  # of the API key
    key: str | None = None  # who pays: a name of the API key, never the key
    after: str | None = None  # the size whose answer was not good enough, see `Cascade`
    difficulty: float | None = None  # what the largest size may gain, -1 to 1: `ByDifficulty`


@dataclass(frozen=True, slots=True)
class Load:
    """The engine now. `queued` requests wait, `running` ones have a slot."""

    queued: int = 0
    running: int = 0
    tokens_per_second: float = 0.0  # made by all sizes together, over the last second or so
    cache_used: float = 0.0  # share of the blocks, 0 to 1
    device_used: float | None = None  # share of the time, 0 to 1; None where nobody tells


@dataclass(frozen=True, slots=True)
class Allowed:
    """What a policy leaves: some of the sizes it was given, and why (empty: it had no say)."""

    sizes: tuple[Size, ...]
    why: str = ""
    escalate_below: float | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """The size that answers, and the reasons of the policies that had a say, in order.

    If the answer's confidence is below `escalate_below`, the caller is to ask again, with
    `Wish.after` this size; refused then, it keeps the answer it has.
    """

    size: str
    why: tuple[str, ...]
    escalate_below: float | None = None


class Refused(Exception):
    """No size may answer.

    `retry_after_s` is when it may be otherwise, in whole seconds from now (HTTP 429 or 503); None
    if no waiting helps and the request itself must change (HTTP 400).
    """

    def __init__(self, why: str, retry_after_s: int | None = None) -> None:
        super().__init__(why)
        self.retry_after_s = retry_after_s


class Policy(Protocol):
    """One reason to choose a size."""

    def allow(self, wish: Wish, load: Load, sizes: tuple[Size, ...]) -> Allowed:
        """Some of these sizes (largest first, never none).

        Raises:
            Refused: none of them may answer.
        """
        ...


class Pinned:
    """The size that the request names, and no other."""

    def allow(self, wish: Wish, load: Load, sizes: tuple[Size, ...]) -> Allowed:
        if wish.size is None:
            return Allowed(sizes)
        pinned = tuple(size for size in sizes if size.name == wish.size)
        if not pinned:
            names = ", ".join(size.name for size in sizes)
            raise Refused(f"size {wish.size[:80]!r} is not among those allowed: {names}")
        return Allowed(pinned, f"pinned: the request names {wish.size}")


class Chooser:
    """The sizes that serve, and the policies in the order in which they are asked."""

    def __init__(self, sizes: Sequence[Size], policies: Sequence[Policy]) -> None:
        """Raises: ValueError: no size, or two of the same name."""
        self.sizes = largest_first(sizes)
        self._policies = list(policies)

    def choose(self, wish: Wish, load: Load) -> Choice:
        """The largest size that every policy allows.

        Raises:
            Refused: by one of the policies; it says which, why, and when to come again.
        """
        left, why, below = self.sizes, [], None
        for policy in self._policies:
            allowed = policy.allow(wish, load, left)
            assert allowed.sizes and set(allowed.sizes) <= set(left), f"{policy} widened the choice"
            left = allowed.sizes
            below = below if allowed.escalate_below is None else allowed.escalate_below
            if allowed.why:
                why.append(allowed.why)
        return Choice(left[0].name, tuple(why) or ("default: the largest size",), below)


def largest_first(sizes: Sequence[Size]) -> tuple[Size, ...]:
    """By active parameters; of equal ones, as they came.

    Raises:
        ValueError: no size, or two of the same name.
    """
    if not sizes:
        raise ValueError("sizes: none")
    if len({size.name for size in sizes}) != len(sizes):
        raise ValueError(f"sizes: two have the same name: {[size.name for size in sizes]}")
    return tuple(sorted(sizes, key=lambda size: -size.active_params))
