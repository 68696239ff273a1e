"""Choosing the size by load: on traces of traffic it follows, settles and does not swing."""

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from policies import IDLE, PRESSED, SIZES, Ticking, pressed, refusal

from star_elastic.serve.device import DeviceUse
from star_elastic.serve.policy import ByLoad, Chooser, Full, Load, Pinned, Wish

# by load: a queue in front of a server whose sizes make so many tokens a second


@dataclass
class Server:
    """Requests of 100 tokens come at a rate; what is not served at once waits."""

    rates: tuple[float, float, float]  # tokens a second at levels 0, 1, 2
    clock: Ticking = field(default_factory=Ticking)
    waiting: float = 0.0  # tokens
    levels: list[int] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)  # seconds, of who comes now

    def __post_init__(self) -> None:
        self.by_load = ByLoad(SIZES, self.clock)
        self.made = [0.0] * 4  # tokens in each of the last ticks

    def run(self, ticks: int, demand: float) -> None:
        for _ in range(ticks):
            rate = self.rates[self.by_load.level]
            made = min(self.waiting + demand / 4, rate / 4)
            self.waiting += demand / 4 - made
            self.made = [*self.made[1:], made]
            self.clock.now += 0.25
            load = Load(queued=int(self.waiting / 100), tokens_per_second=sum(self.made))
            for _ in range(3):  # several requests ask within one tick
                self.by_load.allow(Wish(), load, SIZES)
            self.levels.append(self.by_load.level)
            self.waits.append(self.waiting / rate)


def turns(levels: list[int]) -> int:
    """How often the level went the other way than before."""
    steps = [b - a for a, b in zip(levels, levels[1:], strict=False) if a != b]
    return sum(a * b < 0 for a, b in zip(steps, steps[1:], strict=False))


RATES = st.tuples(st.floats(500, 2_000), st.floats(1.2, 3), st.floats(1.2, 3)).map(
    lambda r: (r[0], r[0] * r[1], r[0] * r[1] * r[2])
)


@given(RATES, st.floats(0.05, 0.95))
@settings(max_examples=300, deadline=None)
def test_steady_traffic_never_swings(rates: tuple[float, float, float], share: float) -> None:
    """At most one overshoot while the queue of the first seconds is served, and no long queue."""
    server = Server(rates)
    server.run(800, share * rates[2])
    assert turns(server.levels) <= 1
    assert server.waiting / 100 < 9  # where the pressure begins


@given(RATES, st.lists(st.tuples(st.integers(1, 80), st.floats(0, 1.3)), max_size=12))
@settings(max_examples=300, deadline=None)
def test_any_trace_moves_one_level_at_a_time_and_rarely(
    rates: tuple[float, float, float], trace: list[tuple[int, float]]
) -> None:
    server = Server(rates)
    for ticks, share in trace:
        server.run(ticks, share * rates[2])
    moves = [abs(b - a) for a, b in zip(server.levels, server.levels[1:], strict=False)]
    assert all(move <= 1 for move in moves)
    ups = sum(b < a for a, b in zip(server.levels, server.levels[1:], strict=False))
    assert ups <= len(server.levels) / 20  # each takes 20 ticks of ease
    server.run(800, 0.0)
    assert server.levels[-1] == 0  # idle: the largest again


@given(RATES)
@settings(max_examples=100, deadline=None)
def test_ten_times_the_traffic_settles_within_ten_seconds(
    rates: tuple[float, float, float],
) -> None:
    """From a twelfth of what the smallest size carries to five sixths of it, and back."""
    server = Server(rates)
    calm = min(rates[2] / 12, 0.7 * rates[0])
    server.run(200, calm)
    assert set(server.levels) == {0}
    server.run(200, 10 * calm)
    after = server.levels[200:]
    settled = max((n for n in range(1, 200) if after[n] != after[n - 1]), default=0)
    assert settled * 0.25 <= 10
    assert turns(after) <= 1
    needed = next(n for n in range(3) if rates[n] > 10 * calm)
    assert max(after[:40]) >= needed
    assert max(after[settled:]) >= needed
    assert server.waits[-1] == 0
    server.run(200, calm)
    assert server.levels[-1] == 0 and turns(server.levels[200:]) <= 2


@given(RATES)
@settings(max_examples=100, deadline=None)
def test_after_a_burst_no_size_smaller_than_needed(rates: tuple[float, float, float]) -> None:
    """What the middle size carried is measured when it alone was at work."""
    server = Server(rates)
    server.run(40, 1.2 * rates[2])
    assert server.levels[-1] == 2
    server.run(800, 0.78 * rates[1])
    assert server.levels[-1] <= 1


def test_ticks_count_not_requests_and_idle_time_is_ease() -> None:
    clock = Ticking()
    by_load = ByLoad(SIZES, clock)
    for _ in range(1_000):
        by_load.observe(PRESSED)
    assert by_load.level == 0  # no time has passed
    by_load = pressed(clock)
    clock.now += 3_600
    by_load.observe(IDLE)  # settles
    clock.now += 3_600
    by_load.observe(IDLE)
    assert by_load.level == 1


def test_a_busy_gpu_presses_only_where_it_was_asked_for() -> None:
    busy = Load(running=4, tokens_per_second=100, device_used=0.99)
    for threshold, load, level in (
        (None, busy, 0),
        (0.95, busy, 1),
        (0.95, Load(running=4, device_used=0.94), 0),
        (0.95, Load(running=4, device_used=None), 0),
    ):
        clock = Ticking()
        by_load = ByLoad(SIZES, clock, device=threshold)
        for _ in range(2):
            clock.now += 0.25
            by_load.observe(load)
        assert by_load.level == level, (threshold, load)
    with pytest.raises(ValueError, match="thresholds are positive"):
        ByLoad(SIZES, Ticking(), device=0.0)


def test_a_device_is_read_a_few_times_a_second_until_it_tells_nothing() -> None:
    clock, answers = Ticking(), [40, 60]
    gpu = torch.device("cuda", 0)
    use = DeviceUse(gpu, lambda device: answers.pop(0), clock)
    assert [use(), use()] == [0.4, 0.4]
    clock.now += 0.25
    assert use() == 0.6
    clock.now += 0.25
    assert [use(), use()] == [None, None]  # the driver's failure is not the server's
    assert DeviceUse(torch.device("cpu"), lambda device: 1 // 0, clock)() is None


def test_a_full_cache_presses_like_a_queue() -> None:
    clock = Ticking()
    by_load = ByLoad(SIZES, clock)
    for _ in range(2):
        clock.now += 0.25
        by_load.observe(Load(running=4, tokens_per_second=100, cache_used=0.95))
    assert by_load.level == 1
    with pytest.raises(ValueError, match="ease is in"):
        ByLoad(SIZES, clock, ease=1.0)


@pytest.mark.parametrize(
    ("load", "seconds"),
    [
        (Load(queued=256, tokens_per_second=4_096), 8),
        (Load(queued=256, tokens_per_second=10**9), 1),
        (Load(queued=10**6, tokens_per_second=1), 60),
        (Load(queued=256), 60),
        (Load(queued=2, tokens_per_second=128, cache_used=1.0), 2),
    ],
)
def test_overload_is_refused_with_a_time(load: Load, seconds: int) -> None:
    for wish in (Wish(), Wish(size="12b")):
        error = refusal(lambda wish=wish: Chooser(SIZES, [Full(), Pinned()]).choose(wish, load))
        assert error.retry_after_s == seconds and "overloaded" in str(error)


@pytest.mark.parametrize("load", [Load(queued=255), Load(cache_used=1.0, running=8)])
def test_a_busy_server_is_not_full(load: Load) -> None:
    assert Full().allow(Wish(), load, SIZES).sizes == SIZES
