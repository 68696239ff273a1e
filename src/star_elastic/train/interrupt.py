"""Stop requests: a step is finished and its state saved before a run ends."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop (Ctrl-C, SIGTERM) and has saved its state."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


@dataclass
class Requests:
    """The signal that asked to stop, if one did."""

    number: int | None = None


@contextmanager
def stop_requests() -> Iterator[Requests]:
    """Note SIGINT and SIGTERM instead of dying; a second SIGINT interrupts at once.

    Outside the main thread no signal arrives, and none is noted.
    """
    requests = Requests()
    if threading.current_thread() is not threading.main_thread():
        yield requests
        return

    def note(number: int, _: object) -> None:
        if requests.number == number == signal.SIGINT:
            raise KeyboardInterrupt
        requests.number = number

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
