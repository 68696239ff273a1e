"""Sizes, a clock and loads for tests of the policies."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from star_elastic.serve.policy import ByLoad, Load, Refused, Size

SMALL, MIDDLE, LARGE = (
    Size("12b", 2_000_000_000),
    Size("23b", 3_000_000_000),
    Size("30b", 4_000_000_000),
)
SIZES = (LARGE, MIDDLE, SMALL)
IDLE = Load()
PRESSED = Load(queued=99, tokens_per_second=100.0)


@dataclass
class Ticking:
    """A clock that goes when it is told to."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def refusal(call: Callable[[], object]) -> Refused:
    with pytest.raises(Refused) as caught:
        call()
    return caught.value


def pressed(clock: Ticking) -> ByLoad:
    """At its lowest level."""
    by_load = ByLoad(SIZES, clock)
    for _ in range(20):
        clock.now += 0.25
        by_load.observe(PRESSED)
    assert by_load.level == 2
    return by_load
