"""By load: smaller sizes while more is asked than the larger ones can do, and back again.

A *level* is a cap: 0 allows every size, the last one only the smallest. It goes down one step after
`down_ticks` ticks under pressure, and up one after `up_ticks` ticks of ease. There is ease only
while the traffic fits the larger size too, else the level would swing for ever: what the larger
size cannot carry puts no pressure on the smaller one. What a level carries is measured: the tokens
a second it made when it gave way.
"""

import math
from collections.abc import Sequence

from star_elastic.serve.policy.choose import (
    Allowed,
    Clock,
    Load,
    Refused,
    Size,
    Wish,
    largest_first,
)

_MOST_SECONDS = 60  # that anyone is told to wait


class ByLoad:
    """Caps the size by queue, cache and, if asked for, the GPU's utilization, with hysteresis.

    State moves with the clock, at most one observation a tick, however many requests ask.
    """

    def __init__(
        self,
        sizes: Sequence[Size],
        clock: Clock,
        queue: int = 8,
        cache: float = 0.9,
        ease: float = 0.5,
        tick_s: float = 0.25,
        down_ticks: int = 2,
        up_ticks: int = 20,
        device: float | None = None,
        settle_ticks: int = 4,
        margin: float = 0.8,
        forget: float = 1e-4,
    ) -> None:
        """
        Args:
            queue, cache: queued requests, and share of the cache, from which there is pressure.
            device: likewise the share of the time in which the GPU works. None: it does not count,
                for a lone sequence can keep a GPU busy; set it where others need that GPU too.
            ease: the fraction of these at and below which there is ease.
            settle_ticks: for which nothing counts after a step: as long as the load looks back.
            margin: the share of what a level once carried that the traffic may be, to go back.
            forget: by which that figure grows with every tick, lest one bad minute rule for ever.

        Raises:
            ValueError: a threshold that is not positive, or an ease not below 1.
        """
        self._device = math.inf if device is None else device
        positive = (queue, cache, self._device, tick_s, down_ticks, up_ticks, margin)
        if min(positive) <= 0 or not 0 <= ease < 1:
            raise ValueError("by load: thresholds are positive, ease is in [0, 1)")
        self._sizes, self._clock = largest_first(sizes), clock
        self._queue, self._cache, self._ease = queue, cache, ease
        self.tick_s, self._down_ticks, self._up_ticks = tick_s, down_ticks, up_ticks
        self._margin, self._forget, self._settle_ticks = margin, forget, settle_ticks
        self._last = clock()
        self._pressed = self._eased = self._unsettled = 0  # ticks
        self._most = 0.0  # tokens a second under the pressure of now
        self._carried: dict[int, float] = {}  # level -> tokens a second when it gave way
        self.level = 0

    def allow(self, wish: Wish, load: Load, sizes: tuple[Size, ...]) -> Allowed:
        """Those up to the cap; if all are larger (a pin, say), the smallest of them."""
        self.observe(load)
        cap = self._sizes[self.level]
        small = tuple(size for size in sizes if size.active_params <= cap.active_params)
        left = small or sizes[-1:]
        if len(left) == len(sizes):
            return Allowed(sizes)
        why = (
            f"load: at most {left[0].name} while {load.queued} wait, {load.running} run at "
            f"{load.tokens_per_second:.0f} tokens/s, cache {load.cache_used:.0%}"
        )
        if self._device < math.inf and load.device_used is not None:
            why += f", device {load.device_used:.0%}"
        return Allowed(left, why)

    def observe(self, load: Load) -> None:
        """Take note of the load, if a tick has passed. `allow` does; call it in between, too."""
        ticks = math.floor((self._clock() - self._last) / self.tick_s)
        if ticks < 1:
            return
        self._last += ticks * self.tick_s
        for level in self._carried:
            self._carried[level] *= (1 + self._forget) ** min(ticks, 10**6)
        if self._unsettled > 0:
            self._unsettled -= ticks
            return
        device = (load.device_used or 0.0) / self._device
        pressure = max(load.queued / self._queue, load.cache_used / self._cache, device)
        if pressure >= 1:
            # Nobody saw the ticks since the last one, so that only this one is known to be pressed.
            self._pressed, self._eased = self._pressed + 1, 0
            self._most = max(self._most, load.tokens_per_second)
        elif pressure <= self._ease and self._fits(load):
            self._pressed, self._eased, self._most = 0, self._eased + ticks, 0.0
        else:
            self._pressed, self._eased, self._most = 0, 0, 0.0
        self._move()

    def _fits(self, load: Load) -> bool:
        """Could the next larger size carry this traffic, as far as is known?"""
        carried = self._carried.get(self.level - 1, math.inf)
        return load.tokens_per_second <= self._margin * carried

    def _move(self) -> None:
        if self._pressed >= self._down_ticks and self.level < len(self._sizes) - 1:
            if self._most:
                self._carried[self.level] = self._most
            self._step(+1)
        elif self._eased >= self._up_ticks and self.level > 0:
            self._step(-1)

    def _step(self, by: int) -> None:
        self.level += by
        self._pressed, self._eased, self._most = 0, 0, 0.0
        self._unsettled = self._settle_ticks


class Full:
    """Refuses what could not be served in time: the queue or the cache is full, pinned or not."""

    def __init__(self, queue: int = 256, cache: float = 1.0, tokens_per_request: int = 256) -> None:
        """
        Args:
            queue: requests that may wait.
            cache: the share of the cache from which nobody may join the queue that there is.
            tokens_per_request: an answer's usual length, to tell when the queue will be gone.
        """
        self._queue, self._cache, self._tokens = queue, cache, tokens_per_request

    def allow(self, wish: Wish, load: Load, sizes: tuple[Size, ...]) -> Allowed:
        """All of them.

        Raises:
            Refused: with the time in which half of the queue will be served, 1 s to 60 s.
        """
        if load.queued >= self._queue:
            raise Refused(f"overloaded: {load.queued} requests wait", self._seconds(load))
        if load.cache_used >= self._cache and load.queued:
            why = f"overloaded: the cache is full ({load.cache_used:.0%}) and {load.queued} wait"
            raise Refused(why, self._seconds(load))
        return Allowed(sizes)

    def _seconds(self, load: Load) -> int:
        if load.tokens_per_second <= 0:
            return _MOST_SECONDS
        half = load.queued / 2 * self._tokens / load.tokens_per_second
        return max(1, min(_MOST_SECONDS, math.ceil(half)))
