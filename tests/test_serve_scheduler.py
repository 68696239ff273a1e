"""The scheduler under any sequence of requests, cancellations and steps, and its promises."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from star_elastic.serve.scheduler import Scheduler, Work
from star_elastic.serve.space import Job, Space

POOL_OF = {"12b": 0, "23b": 0, "30b": 1}  # the first two share a pool
BLOCK = 4


@dataclass
class Run:
    """A scheduler and a model that always answers 0; what it did, step by step."""

    slots: int = 2
    blocks: int = 8
    step_tokens: int = 9
    reuse: bool = False
    snapshots: int = 0  # places; 0: no recurrent state
    trace: list[list[tuple[str, int, list[int]]]] = field(default_factory=list)
    sampled: dict[int, int] = field(default_factory=dict)
    computed: dict[int, int] = field(default_factory=dict)
    finished: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.spaces = [
            Space(self.slots, self.blocks, BLOCK, self.reuse, self.snapshots) for _ in range(2)
        ]
        self.scheduler = Scheduler(self.step_tokens)
        for size, pool in POOL_OF.items():
            self.scheduler.add_size(size, self.spaces[pool])
        self.count = 0

    def add(self, size: str, prompt: int, answer: int, priority: int = 0) -> int:
        self.count += 1
        job = Job(self.count, size, [1] * prompt, prompt + answer, priority)
        self.scheduler.add(job)
        self.sampled[job.id] = self.computed[job.id] = 0
        return job.id

    def remove(self, id: int) -> bool:
        return self.scheduler.remove(id) is not None

    def step(self) -> list[Work]:
        first = [min(s.running, key=lambda job: job.rank, default=None) for s in self.spaces]
        works = self.scheduler.schedule()
        self.check(works)
        for space, job in zip(self.spaces, first, strict=True):  # only to a better priority
            if job is not None and job.slot is None:
                assert min(other.priority for other in space.running) < job.priority
        self.trace.append([(w.size, w.count, [job.id for job in w.jobs]) for w in works])
        for work in works:
            for job in work.jobs:
                self.computed[job.id] += work.count
            ready = self.scheduler.advance(work)
            for job in work.jobs:
                self.spaces[POOL_OF[job.size]].keep(job)
            for job in ready:
                job.tokens.append(0)
                self.sampled[job.id] += 1
                if len(job.tokens) == job.max_length:
                    self.finished.append(job.id)
                    self.scheduler.remove(job.id)
        return works

    def finish(self, limit: int = 10_000) -> None:
        while self.scheduler.jobs and limit:
            self.step()
            limit -= 1
        assert not self.scheduler.jobs

    def check(self, works: Sequence[Work]) -> None:
        """What is true of every step."""
        for space in self.spaces:
            slots = [job.slot for job in space.running if job.slot is not None]
            assert sorted([*space.free_slots, *slots]) == list(range(self.slots))
            held = {block for job in space.running for block in job.blocks}
            free = len(space.free_blocks) + space.prefixes.num_unused
            assert not held & {*space.free_blocks} and free + len(held) == self.blocks
            assert len({*space.free_blocks}) == len(space.free_blocks)
        moved = {job.id: (work, job) for work in works for job in work.jobs}
        assert len(moved) == sum(len(work.jobs) for work in works)
        assert sum(work.count * len(work.jobs) for work in works) <= self.step_tokens
        for work, job in moved.values():
            assert job.size == work.size and 1 <= work.count <= job.num_uncached
            assert job.slot is not None
            assert len(job.blocks) * BLOCK >= job.num_cached + work.count
        running = [job for space in self.spaces for job in space.running]
        assert {job.id for job in running if job.num_uncached == 1} <= moved.keys()
        assert bool(works) == bool(self.scheduler.jobs)  # there is always somebody to serve
        for size in POOL_OF:
            count = self.scheduler.num_running(size) + self.scheduler.num_waiting(size)
            assert count == sum(job.size == size for job in self.scheduler.jobs.values())


def requests() -> st.SearchStrategy[tuple[str, int, int, int]]:
    """Size, prompt, answer, priority; each fits its pool alone."""
    return st.tuples(
        st.sampled_from(list(POOL_OF)), st.integers(1, 20), st.integers(1, 12), st.integers(0, 2)
    )


ACTIONS = st.lists(
    st.one_of(requests(), st.integers(1, 12), st.just("step"), st.just("step")), max_size=60
)


def play(
    actions: Sequence[tuple[str, int, int, int] | int | str], **kind: Any
) -> tuple[Run, dict[int, int]]:
    """Requests, cancellations (an id) and steps; then steps until all is done."""
    run, wanted = Run(**kind), {}
    for action in actions:
        if isinstance(action, tuple):
            wanted[run.add(*action)] = action[2]
        elif isinstance(action, int):
            was_there = action in run.scheduler.jobs
            assert run.remove(action) == was_there
            if was_there:
                del wanted[action]
        else:
            run.step()
    run.finish()
    return run, wanted


KINDS: list[dict[str, Any]] = [{}, {"reuse": True}, {"reuse": True, "snapshots": 2}]


@pytest.mark.parametrize("kind", KINDS, ids=["no reuse", "reuse", "recurrent"])
@settings(max_examples=200, deadline=None)
@given(actions=ACTIONS)
def test_every_request_ends_with_all_its_tokens(
    kind: dict[str, Any], actions: list[tuple[str, int, int, int] | int | str]
) -> None:
    run, wanted = play(actions, **kind)
    assert {id: run.sampled[id] for id in wanted} == wanted
    assert run.spaces[0].free_slots and not any(map(run.scheduler.num_waiting, POOL_OF))
    again, _ = play(actions, **kind)
    assert again.trace == run.trace


def test_decoding_goes_on_beside_a_long_prompt() -> None:
    run = Run(slots=2, blocks=30, step_tokens=9)
    short, long = run.add("12b", 3, 12), run.add("12b", 60, 2)
    run.step()
    for count in (8, 8, 8, 8, 8):
        run.step()
        assert run.trace[-1] == [("12b", 1, [short]), ("12b", count, [long])]


def test_sequences_of_a_size_that_advance_equally_share_a_call() -> None:
    run = Run(slots=3, blocks=30, step_tokens=20)
    first, second, third = run.add("12b", 5, 3), run.add("23b", 5, 3), run.add("12b", 5, 3)
    run.step()
    assert run.trace[-1] == [("12b", 5, [first, third]), ("23b", 5, [second])]
    run.step()
    assert run.trace[-1] == [("12b", 1, [first, third]), ("23b", 1, [second])]


def test_first_come_first_served_within_a_size() -> None:
    run = Run(slots=1)
    ids = [run.add("30b", 4, 2) for _ in range(5)]
    run.finish()
    assert run.finished == ids


def test_no_size_waits_behind_the_queue_of_another() -> None:
    """Fifty of one size are there first; the other size, in the same pool, takes every turn."""
    run = Run(slots=1)
    flood = [run.add("12b", 4, 2) for _ in range(50)]
    few = [run.add("23b", 4, 2) for _ in range(3)]
    run.finish()
    assert run.finished[:6] == [id for pair in zip(flood, few, strict=False) for id in pair]
    assert run.finished[6:] == flood[3:]


def test_pools_do_not_wait_for_one_another() -> None:
    run = Run(slots=1)
    for _ in range(20):
        run.add("12b", 4, 8)
    other = run.add("30b", 4, 2)
    run.step()
    run.step()
    assert run.finished == [other]


def test_a_better_priority_takes_the_slot_of_a_worse() -> None:
    run = Run(slots=1)
    worse = run.add("12b", 4, 6, priority=1)
    run.step()
    run.step()
    same, better = run.add("23b", 4, 2, priority=1), run.add("23b", 4, 2, priority=0)
    run.finish()
    assert run.finished == [better, worse, same]
    assert run.scheduler.preemptions == 1
    assert run.computed[worse] > 4 + 5  # its prompt and its first answers came twice


def test_the_oldest_keeps_its_cache_when_there_is_too_little() -> None:
    run = Run(slots=2, blocks=6)  # 24 tokens
    old, young = run.add("12b", 8, 14), run.add("12b", 8, 14)
    run.finish()
    assert run.finished == [old, young] and run.scheduler.preemptions >= 1
    assert run.computed[old] == 8 + 14 - 1
    assert run.computed[young] > 8 + 14 - 1
    assert run.sampled == {old: 14, young: 14}


def waiting(run: Run) -> Iterator[int]:
    return (id for id, job in run.scheduler.jobs.items() if job.slot is None)


def test_cancelled_in_every_phase() -> None:
    run = Run(slots=2, blocks=8, step_tokens=9)
    first, second, third = (run.add("12b", 12, 14) for _ in range(3))
    assert list(waiting(run)) == [first, second, third]
    run.step()
    assert run.scheduler.jobs[first].num_cached == 9 and list(waiting(run)) == [third]
    assert run.remove(first)  # in its prompt
    run.step()
    assert not list(waiting(run)) and run.remove(third)
    while run.scheduler.jobs[second].num_uncached != 1:
        run.step()
    assert run.remove(second)  # decoding
    assert not run.remove(second)
    assert not run.scheduler.jobs and not run.step()


def test_preempted_ones_can_be_cancelled() -> None:
    run = Run(slots=2, blocks=6)
    old, young = run.add("12b", 8, 14), run.add("12b", 8, 14)
    while not run.scheduler.preemptions:
        run.step()
    assert list(waiting(run)) == [young] and run.remove(young)
    run.finish()
    assert run.finished == [old]


def test_what_could_never_run_is_refused() -> None:
    run = Run(blocks=4)
    with pytest.raises(ValueError, match="17 tokens: the cache holds 16"):
        run.add("12b", 9, 8)
    with pytest.raises(ValueError, match="step_tokens 4: must be above 4"):
        Run(step_tokens=4)
