"""An engine on a thread of its own; its tokens come to an asyncio loop.

All that touches the engine runs on that thread, between two steps: requests, cancellations, and
whatever `call` is given. A step that raises ends the requests that were open, and the next ones are
served.
"""

import asyncio
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from star_elastic.serve.device import DeviceUse
from star_elastic.serve.engine import Engine, Event, Request
from star_elastic.serve.policy import Load

_WINDOW_S = 1.0  # that tokens per second look back
_IDLE_S = 0.2  # after which an idle thread looks whether it is to end
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Told:
    """An event of one of several requests, when it happened, and how long the request waited."""

    index: int
    event: Event
    at: float  # seconds, `time.monotonic`
    queued_s: float


@dataclass(eq=False)
class _Listener:
    loop: asyncio.AbstractEventLoop
    inbox: asyncio.Queue[Told]
    index: int
    since: float
    queued_s: float | None = None  # None while it waits


class Run:
    """Some requests that began together: iterate over what is told of them, and close it."""

    def __init__(self, worker: "Worker") -> None:
        self._worker = worker
        self._inbox: asyncio.Queue[Told] = asyncio.Queue()
        self._open: dict[int, int] = {}  # index -> id

    def open(self, index: int, id: int) -> asyncio.Queue[Told]:
        """Note a request that was queued; where to tell of it."""
        self._open[index] = id
        return self._inbox

    async def told(self) -> AsyncIterator[Told]:
        """Every token and end, until all have ended."""
        while self._open:
            told = await self._inbox.get()
            if told.index not in self._open:
                continue  # it was cancelled meanwhile
            if told.event.finish:
                del self._open[told.index]
            yield told

    def cancel(self, index: int) -> None:
        """End one of the requests; nothing more is told of it."""
        id = self._open.pop(index, None)
        self._worker.post(lambda: self._worker.drop(id))

    def close(self) -> None:
        """End those that have not ended; safe to repeat."""
        for index in list(self._open):
            self.cancel(index)


class Worker:
    """Runs an engine until it is stopped."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._device_used = DeviceUse(engine.device)
        self._calls: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._listeners: dict[int, _Listener] = {}
        self._made: deque[tuple[float, int]] = deque()  # (when, tokens) of the last second
        self._stopping = False
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def stop(self) -> None:
        """End after the step that is under way; blocks until then."""
        self._stopping = True
        if self._thread.is_alive():
            self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether the thread works."""
        return self._thread.is_alive() and not self._stopping

    def load(self) -> Load:
        """The engine's load now; safe on any thread."""
        stats = self.engine.stats
        since = time.monotonic() - _WINDOW_S
        made = sum(tokens for at, tokens in self._made.copy() if at >= since)
        return Load(
            stats.queued,
            stats.running,
            made / _WINDOW_S,
            stats.cache_used,
            self._device_used(),
        )

    def post(self, action: Callable[[], object]) -> None:
        """Have something done on the engine's thread, after all that was posted before."""
        self._calls.put(action)

    async def call(self, action: Callable[[], Result]) -> Result:
        """What `action` returns on the engine's thread, or raises there."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()

        def settle(result: Result | None, error: Exception | None) -> None:
            if future.cancelled():
                return
            if error is None:
                future.set_result(result)  # type: ignore[arg-type]
            else:
                future.set_exception(error)

        def act() -> None:
            try:
                done = action()
            except Exception as error:  # the caller's
                loop.call_soon_threadsafe(settle, None, error)
            else:
                loop.call_soon_threadsafe(settle, done, None)

        self.post(act)
        return await future

    async def run(self, requests: Sequence[Request]) -> Run:
        """Queue requests, all of them or none.

        Raises:
            ValueError: as `Engine.submit`.
        """
        run, loop, since = Run(self), asyncio.get_running_loop(), time.monotonic()

        def submit() -> None:
            for index, request in enumerate(requests):
                id = self.engine.submit(request)
                self._listeners[id] = _Listener(loop, run.open(index, id), index, since)

        try:
            await self.call(submit)
        except BaseException:  # also if nobody waits any more: what was queued, goes
            self.post(run.close)
            raise
        return run

    def drop(self, id: int | None) -> None:
        """End a request that nobody listens to any more. On the engine's thread."""
        if id is not None and self._listeners.pop(id, None) is not None:
            self.engine.cancel(id)

    def _loop(self) -> None:
        while not self._stopping:
            self._act()
            if self.engine.busy:
                self._step()

    def _act(self) -> None:
        """Do what was posted; wait for something if there is nothing else to do."""
        try:
            self._calls.get(block=not self.engine.busy, timeout=_IDLE_S)()
            while True:
                self._calls.get_nowait()()
        except queue.Empty:
            return

    def _step(self) -> None:
        began = time.monotonic()
        try:
            events = self.engine.step()
        except Exception as error:  # of many kinds; those who were open are told
            why = f"{type(error).__name__}: {error}"
            events = [Event(id, finish="error", error=why) for id in self._listeners]
            for event in events:
                self.engine.cancel(event.id)
        now = time.monotonic()
        tokens = sum(event.token is not None for event in events)
        self._made.append((now, tokens))
        while self._made[0][0] < now - _WINDOW_S:
            self._made.popleft()
        self._note_admitted(began)
        self._tell(events, now)

    def _note_admitted(self, began: float) -> None:
        for id, listener in self._listeners.items():
            if listener.queued_s is None:
                job = self.engine.scheduler.jobs.get(id)
                if job is None or job.slot is not None:
                    listener.queued_s = max(0.0, began - listener.since)

    def _tell(self, events: Sequence[Event], now: float) -> None:
        """One wake-up of a loop for all that it is to hear."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Queue[Told], Told]]] = {}
        for event in events:
            listener = self._listeners.get(event.id)
            if listener is None:
                continue  # it went away
            if event.finish:
                del self._listeners[event.id]
            told = Told(listener.index, event, now, listener.queued_s or 0.0)
            by_loop.setdefault(listener.loop, []).append((listener.inbox, told))
        for loop, heard in by_loop.items():
            try:
                loop.call_soon_threadsafe(_deliver, heard)
            except RuntimeError:  # a loop that is closed listens no more
                for _, told in heard:
                    self.drop(told.event.id)


def _deliver(heard: Sequence[tuple[asyncio.Queue[Told], Told]]) -> None:
    for inbox, told in heard:
        inbox.put_nowait(told)
