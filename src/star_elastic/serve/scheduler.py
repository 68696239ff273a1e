"""Which sequences advance in a step, and by how many tokens: no tensors, no clock, no chance.

Every sequence has a number of tokens and a number of them that is cached. A step brings cached
tokens closer to all of them: by one for a sequence that decodes, by a chunk for a prompt. A token
is sampled where the last one was cached, so a sequence that lost its cache (preempted) is
recomputed by the same rule, and nothing is sampled twice.

- Order is by priority (lower first), then arrival. Sizes take turns at free slots, so none starves.
- A prompt is admitted when its pool has a slot and blocks for all of it. A strictly better priority
  may take the slot of a worse one.
- A sequence that needs one block more when none is free takes those of the last in order. The first
  in order is never preempted, so work always ends.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from star_elastic.serve.space import Job, Space


@dataclass(frozen=True)
class Work:
    """One forward call: each of these sequences, all of one size, advances by `count` tokens."""

    size: str
    count: int
    jobs: tuple[Job, ...]


class Scheduler:
    """Requests of all sizes over the pools that their sizes share."""

    def __init__(self, step_tokens: int):
        """`step_tokens`: at most so many tokens in a step; decoding goes before prompts."""
        self.step_tokens = step_tokens
        self.jobs: dict[int, Job] = {}
        self.admitted: list[Job] = []  # by the last `schedule`
        self.preemptions = 0
        self._space_of: dict[str, Space] = {}
        self._waiting: dict[str, list[Job]] = {}
        self._turn: dict[str, int] = {}  # number of the last admission of each size
        self._admissions = 0

    def add_size(self, size: str, space: Space) -> None:
        """Take sequences of a size, which live in this space; sizes may share one.

        Raises:
            ValueError: too few tokens for all slots to decode and a prompt to advance.
        """
        slots = sum(each.slots for each in {*self._spaces, space})
        if self.step_tokens <= slots:
            raise ValueError(f"step_tokens {self.step_tokens}: must be above {slots}, the slots")
        self._space_of[size], self._waiting[size], self._turn[size] = space, [], 0

    def remove_size(self, size: str) -> None:
        """Forget a size that has no sequence, and what it computed."""
        assert not self.num_waiting(size) + self.num_running(size)
        self._space_of.pop(size).forget_size(size)
        del self._waiting[size], self._turn[size]

    def num_waiting(self, size: str) -> int:
        """Sequences of a size without a slot, new ones and preempted ones."""
        return len(self._waiting.get(size, ()))

    def num_running(self, size: str) -> int:
        """Sequences of a size with a slot."""
        space = self._space_of.get(size)
        return 0 if space is None else [job.size for job in space.running].count(size)

    def add(self, job: Job) -> None:
        """Queue a sequence; its id must be above all earlier ones'.

        Raises:
            ValueError: more tokens than its pool could ever hold.
        """
        space = self._space_of[job.size]
        if job.max_length > space.capacity:
            raise ValueError(f"{job.max_length} tokens: the cache holds {space.capacity}")
        self.jobs[job.id] = job
        self._waiting[job.size].append(job)

    def remove(self, id: int, failed: bool = False) -> Job | None:
        """Drop a sequence in whatever phase it is, and free what it holds; None if unknown.

        What one that `failed` has computed is not reused.
        """
        job = self.jobs.pop(id, None)
        if job is not None and job.slot is not None:
            self._space_of[job.size].release(job, forget=failed)
        elif job is not None:
            self._waiting[job.size].remove(job)
        return job

    def schedule(self) -> list[Work]:
        """The forward calls of one step. Follow each with `advance`, or `remove` its sequences."""
        self.admitted = []
        for space in self._spaces:
            self._grow_all(space)
            self._admit_all(space)
        running = sorted((j for s in self._spaces for j in s.running), key=lambda job: job.rank)
        return list(_grouped(self._counts(running)))

    def advance(self, work: Work) -> list[Job]:
        """Note that a call was made; its sequences that now want a token sampled."""
        for job in work.jobs:
            job.num_cached += work.count
        return [job for job in work.jobs if not job.num_uncached]

    def _counts(self, running: Sequence[Job]) -> Iterable[tuple[Job, int]]:
        """How far each running sequence advances, decoding ones first."""
        decoding = [job for job in running if job.num_uncached == 1]
        yield from ((job, 1) for job in decoding)
        left = self.step_tokens - len(decoding)
        for job in running:
            if job.num_uncached > 1 and left:
                ends = [cut - job.num_cached for cut in job.cuts if cut > job.num_cached]
                count = min(job.num_uncached, left, *ends)
                left -= count
                yield job, count

    def _grow_all(self, space: Space) -> None:
        """Blocks for every running sequence's tokens, if need be those of the last in order."""
        for job in sorted(space.running, key=lambda job: job.rank):
            while job.slot is not None and not space.grow(job, len(job.tokens)):
                self._preempt(space, max(space.running, key=lambda job: job.rank))

    def _admit_all(self, space: Space) -> None:
        """Admit the first in line until one does not fit; those behind it wait their turn."""
        while (job := self._next(space)) is not None:
            while not space.admit(job):
                worst = max(space.running, key=lambda job: job.rank)
                if worst.priority <= job.priority:
                    return
                self._preempt(space, worst)
            self._waiting[job.size].remove(job)
            self.admitted.append(job)
            self._admissions += 1
            self._turn[job.size] = self._admissions

    def _next(self, space: Space) -> Job | None:
        """Best priority first, then the size that was admitted longest ago, then arrival."""
        heads = [
            min(waiting, key=lambda job: job.rank)
            for size, waiting in self._waiting.items()
            if waiting and self._space_of[size] is space
        ]
        return min(
            heads, key=lambda job: (job.priority, self._turn[job.size], job.id), default=None
        )

    def _preempt(self, space: Space, job: Job) -> None:
        space.release(job)
        self._waiting[job.size].append(job)
        self.preemptions += 1

    @property
    def _spaces(self) -> list[Space]:
        """Each once, always in the same order."""
        return list(dict.fromkeys(self._space_of.values()))


def _grouped(counts: Iterable[tuple[Job, int]]) -> Iterable[Work]:
    """One call for all sequences of a size that advance equally far."""
    groups: dict[tuple[str, int], list[Job]] = {}
    for job, count in counts:
        groups.setdefault((job.size, count), []).append(job)
    for (size, count), jobs in groups.items():
        yield Work(size, count, tuple(jobs))
