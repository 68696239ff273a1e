"""One server behind: whether it is well, what it does, and how fast."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from star_elastic.serve.answers import AnswerFailed
from star_elastic.serve.upstream.errors import Unusable
from star_elastic.serve.upstream.figures import Figures
from star_elastic.serve.upstream.settings import UpstreamSettings
from star_elastic.serve.upstream.spec import Spec

Clock = Callable[[], float]  # seconds, never going back
_SLOTS_PER_S = 10
_LEAST_BUSY_S = 0.1  # lest "Retry-After: 0" be a loop


@dataclass(frozen=True, slots=True)
class ReplicaState:
    """A replica as an operator sees it; a drained one has `in_flight` 0 in the end."""

    size: str
    url: str
    model: str | None
    state: Literal["up", "down", "draining"]
    in_flight: int
    tokens_per_second: float
    why: str  # of its last failure; empty if there was none since it was well


class Pace:
    """Tokens of the last second, in slots of a tenth."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._slots: deque[list[int]] = deque(maxlen=_SLOTS_PER_S)  # [slot, tokens]

    def add(self, tokens: int) -> None:
        now = self._slot()
        if not self._slots or self._slots[-1][0] != now:
            self._slots.append([now, 0])
        self._slots[-1][1] += tokens

    @property
    def per_second(self) -> float:
        since = self._slot() - _SLOTS_PER_S
        return float(max(0, sum(tokens for slot, tokens in self._slots if slot > since)))

    def _slot(self) -> int:
        return int(self._clock() * _SLOTS_PER_S)


@dataclass(eq=False)
class Replica:
    """Its state; `up` is the watch's verdict, `draining` the operator's.

    `silent` of those in flight have had no piece yet. `takes_budget` is false once the server has
    refused a budget of thinking.
    """

    spec: Spec
    settings: UpstreamSettings
    clock: Clock
    up: bool = False
    draining: bool = False
    identified: bool = False
    model: str | None = None
    context_tokens: int | None = None
    takes_budget: bool = True
    in_flight: int = 0
    silent: int = 0
    chosen: int = 0  # when it was last chosen, in requests of its size
    why: str = ""
    figures: Figures | None = None
    _bad_probes: int = 0
    _strikes: int = 0
    _rest_until: float = float("-inf")
    _busy_until: float = float("-inf")
    pace: Pace = field(init=False)

    def __post_init__(self) -> None:
        self.pace = Pace(self.clock)
        self.model = self.spec.model

    @property
    def usable(self) -> bool:
        return self.up and not self.draining and self.model is not None

    @property
    def resting(self) -> bool:
        """Whether others are to be preferred for a while."""
        return self.clock() < self._rest_until

    @property
    def busy_s(self) -> float:
        """How much longer it wants no requests, as it said itself; 0 if it takes them."""
        return max(0.0, self._busy_until - self.clock())

    @property
    def burden(self) -> int:
        """Requests there: ours, and those of others as far as it tells."""
        return self.in_flight + (self.figures.others if self.figures is not None else 0)

    @property
    def state(self) -> ReplicaState:
        verdict = "draining" if self.draining else "up" if self.usable else "down"
        spec, pace = self.spec, self.pace.per_second
        return ReplicaState(
            spec.size, spec.url, self.model, verdict, self.in_flight, pace, self.why
        )

    @contextmanager
    def serving(self) -> Iterator["Serving"]:
        """Count a request as in flight."""
        serving = Serving(self)
        self.in_flight += 1
        self.silent += 1
        try:
            yield serving
        finally:
            self.in_flight -= 1
            self.silent -= serving.silent

    def probed_well(self, figures: Figures | None) -> None:
        """A probe succeeded; one is enough."""
        self._bad_probes = 0
        self.figures = figures
        if not self.up:
            self.up, self.why = True, ""

    def probed_badly(self, why: str) -> None:
        """A probe failed; some in a row take it out."""
        self._bad_probes += 1
        self.figures, self.why = None, why
        if self._bad_probes >= self.settings.failures:
            self.take_out()

    def failed(self, error: Unusable | AnswerFailed) -> None:
        """A request failed here, before its first piece or after it."""
        self._strikes += 1
        self.why = str(error)
        if self._strikes >= self.settings.failures:
            self._rest_until = self.clock() + self.settings.rest_s
        if isinstance(error, Unusable) and error.unreachable:
            self.take_out()
        if isinstance(error, Unusable) and error.retry_after_s is not None:
            self._busy_until = self.clock() + max(error.retry_after_s, _LEAST_BUSY_S)

    def answered(self) -> None:
        """A request was answered to its end."""
        self._strikes = 0

    def take_out(self) -> None:
        """It is down until a probe says otherwise; what comes back may be another model."""
        self.up = False
        self.forget()

    def forget(self) -> None:
        """What the server told of itself is to be asked again."""
        self.identified, self.takes_budget, self.figures = False, True, None


@dataclass
class Serving:
    """A request at a replica."""

    replica: Replica
    silent: int = 1

    def heard(self, tokens: int) -> None:
        """A piece came."""
        self.replica.silent -= self.silent
        self.silent = 0
        self.replica.pace.add(tokens)
