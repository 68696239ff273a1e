"""How a folder that nobody vouches for must answer: one error, in one line, within a second."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from star_elastic.checkpoint import Checkpoint
from star_elastic.folder import CheckpointError


@contextmanager
def promptly(cpu: float = 1.0, wall: float = 10.0) -> Iterator[None]:
    """Seconds of computing, and of waiting for a pipe that nobody writes to."""

    def give_up(*_: Any) -> None:
        raise TimeoutError(f"no answer within {wall} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, wall)
    start = time.process_time()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert time.process_time() - start < cpu


@contextmanager
def answers(folder: Path, *named: str, cpu: float = 1.0) -> Iterator[None]:
    """What is done here is an error that names these, short enough for a terminal."""
    with promptly(cpu), pytest.raises(CheckpointError) as error:
        yield
    message = str(error.value)
    assert message.isprintable() and len(message) < 1000
    message = message.replace(str(folder.parent), "")  # it holds the test's own name
    for each in named:
        assert each in message, message


def refuses(folder: Path, *named: str, cpu: float = 1.0) -> None:
    """Opening it is such an error."""
    with answers(folder, *named, cpu=cpu):
        Checkpoint.open(folder)
