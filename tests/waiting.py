"""Waiting for what must come, however busy the machine is."""

import time
from collections.abc import Callable
from typing import TypeVar

Found = TypeVar("Found")


def until(found: Callable[[], Found], seconds: float = 30.0) -> Found:
    """What `found` returns, as soon as that is true.

    Raises:
        AssertionError: it never was, within so many seconds.
    """
    deadline = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.01)
    return value
