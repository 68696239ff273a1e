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

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(eq=False)
class Job:
    """One sequence: its tokens (prompt and generated) and what of the cache it holds."""

    id: int
    size: str
    tokens: list[int]
    max_length: int  # tokens that it may come to have
    priority: int = 0
    num_cached: int = 0
    slot: int | None = None
    blocks: list[int] = field(default_factory=list)

    @property
    def num_uncached(self) -> int:
        """Tokens still to compute before the next one can be sampled."""
        return len(self.tokens) - self.num_cached

    @property
    def rank(self) -> tuple[int, int]:
        """Lower goes first: priority, then arrival (ids count up)."""
        return self.priority, self.id


@dataclass(frozen=True)
class Work:
    """One forward call: each of these sequences, all of one size, advances by `count` tokens."""

    size: str
    count: int
    jobs: tuple[Job, ...]


class Space:
    """Free slots and blocks of one pool, and the sequences that hold the others."""

    def __init__(self, slots: int, blocks: int, block_size: int):
        self.block_size = block_size
        self.capacity = blocks * block_size  # tokens
        self.free_slots = list(range(slots))[::-1]
        self.free_blocks = list(range(blocks))[::-1]
        self.running: list[Job] = []

    def lacking(self, job: Job, tokens: int) -> int:
        """Blocks that a sequence needs beyond its own to hold so many tokens."""
        return -(-tokens // self.block_size) - len(job.blocks)

    def grow(self, job: Job, tokens: int) -> bool:
        """Give a sequence blocks for so many tokens, if there are enough."""
        lacking = self.lacking(job, tokens)
        if lacking > len(self.free_blocks):
            return False
        job.blocks += [self.free_blocks.pop() for _ in range(lacking)]
        return True

    def admit(self, job: Job) -> bool:
        """Give a sequence a slot and blocks for all its tokens, if there are enough."""
        if not self.free_slots or not self.grow(job, len(job.tokens)):
            return False
        job.slot = self.free_slots.pop()
        self.running.append(job)
        return True

    def release(self, job: Job) -> None:
        """Take back all that a sequence holds; what it had cached is lost."""
        assert job.slot is not None
        self.running.remove(job)
        self.free_slots.append(job.slot)
        self.free_blocks += job.blocks
        job.slot, job.blocks, job.num_cached = None, [], 0


class Scheduler:
    """Requests of all sizes over the pools that their sizes share."""

    def __init__(self, pool_of: Mapping[str, int], spaces: Sequence[Space], step_tokens: int):
        """
        Args:
            pool_of: size -> index of its pool in `spaces`.
            step_tokens: at most so many tokens in a step; decoding goes before prompts.

        Raises:
            ValueError: too few tokens for all slots to decode and a prompt to advance.
        """
        slots = sum(len(space.free_slots) for space in spaces)
        if step_tokens <= slots:
            raise ValueError(f"step_tokens {step_tokens}: must be above {slots}, the slots")
        self.step_tokens = step_tokens
        self.jobs: dict[int, Job] = {}
        self.preemptions = 0
        self._pool_of = dict(pool_of)
        self._spaces = list(spaces)
        self._waiting: dict[str, list[Job]] = {size: [] for size in pool_of}
        self._turn = dict.fromkeys(pool_of, 0)  # number of the last admission of each size
        self._admissions = 0

    @property
    def num_waiting(self) -> int:
        """Sequences without a slot, new ones and preempted ones."""
        return sum(map(len, self._waiting.values()))

    @property
    def num_running(self) -> int:
        """Sequences with a slot."""
        return sum(len(space.running) for space in self._spaces)

    def add(self, job: Job) -> None:
        """Queue a sequence; its id must be above all earlier ones'.

        Raises:
            ValueError: more tokens than its pool could ever hold.
        """
        space = self._space(job)
        if job.max_length > space.capacity:
            raise ValueError(f"{job.max_length} tokens: the cache holds {space.capacity}")
        self.jobs[job.id] = job
        self._waiting[job.size].append(job)

    def remove(self, id: int) -> Job | None:
        """Forget a sequence in whatever phase it is, and free what it holds; None if unknown."""
        job = self.jobs.pop(id, None)
        if job is not None and job.slot is not None:
            self._space(job).release(job)
        elif job is not None:
            self._waiting[job.size].remove(job)
        return job

    def schedule(self) -> list[Work]:
        """The forward calls of one step. Follow each with `advance`, or `remove` its sequences."""
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
                count = min(job.num_uncached, left)
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
            self._admissions += 1
            self._turn[job.size] = self._admissions

    def _next(self, space: Space) -> Job | None:
        """Best priority first, then the size that was admitted longest ago, then arrival."""
        sizes = [size for size, pool in self._pool_of.items() if self._spaces[pool] is space]
        heads = [
            min(self._waiting[size], key=lambda job: job.rank)
            for size in sizes
            if self._waiting[size]
        ]
        return min(
            heads, key=lambda job: (job.priority, self._turn[job.size], job.id), default=None
        )

    def _preempt(self, space: Space, job: Job) -> None:
        space.release(job)
        self._waiting[job.size].append(job)
        self.preemptions += 1

    def _space(self, job: Job) -> Space:
        return self._spaces[self._pool_of[job.size]]


def _grouped(counts: Iterable[tuple[Job, int]]) -> Iterable[Work]:
    """One call for all sequences of a size that advance equally far."""
    groups: dict[tuple[str, int], list[Job]] = {}
    for job, count in counts:
        groups.setdefault((job.size, count), []).append(job)
    for (size, count), jobs in groups.items():
        yield Work(size, count, tuple(jobs))
