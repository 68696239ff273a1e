"""Continuous batching of every size: requests in, tokens out, step by step.

One step makes a forward call per size and chunk length over the rows that the scheduler picked;
the models are stock views of one parent. A sequence's tokens do not depend on what else is in the
batch, nor on whether its prompt was computed before. A request that fails, fails alone: a call that
raises is made again row by row.

The engine is synchronous and belongs to one thread; `stats` may be read on any.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from star_elastic.model import ElasticModel
from star_elastic.serve.cache import Row, Rows
from star_elastic.serve.pools import Pools, Served
from star_elastic.serve.request import Answer, Event, Request
from star_elastic.serve.sampling import Sampling, likeliest
from star_elastic.serve.scheduler import Scheduler, Work
from star_elastic.serve.space import Job
from star_elastic.serve.stats import SizeStats, Stats
from star_elastic.submodel import Fields

__all__ = ["Engine", "Event", "Request"]


class Engine:
    """Serves sizes of a model from its one copy of the weights."""

    def __init__(
        self,
        model: ElasticModel,
        slots: int = 8,
        max_length: int = 2048,
        cache_tokens: int | None = None,
        step_tokens: int = 512,
        block_size: int = 16,
        sizes: Sequence[str] | None = None,
        reuse: bool = True,
    ):
        """Allocate all caches.

        Args:
            slots: sequences at once, in each pool of sizes with equal cache shapes.
            max_length: tokens of prompt and answer together.
            cache_tokens: tokens of all sequences of a pool together, as many as its slots could
                take if None.
            step_tokens: tokens computed in one step, of all sequences together.
            sizes: names to serve; all if None.
            reuse: do not compute again how a prompt begins, where that was computed before.

        Raises:
            ValueError: a size that is not there, or that stock classes cannot run in such a batch;
                numbers that leave no room to work in.
        """
        numbers = {"slots": slots, "max_length": max_length, "block_size": block_size}
        for name, value in numbers.items():
            if value < 1:
                raise ValueError(f"{name} {value}: must be at least 1")
        tokens = slots * max_length if cache_tokens is None else cache_tokens
        if tokens < max_length:
            raise ValueError(f"cache_tokens {tokens}: must be at least max_length {max_length}")
        self.max_length, self.device = max_length, model.parent.device
        # every sequence may leave its last block part empty
        blocks = tokens // block_size + slots
        self._pools = Pools(model, slots, blocks, block_size, max_length, reuse)
        self._sizes: dict[str, Served] = {}
        self.scheduler = Scheduler(step_tokens)
        self._open: dict[int, Answer] = {}
        self._pending: list[Event] = []
        self._next_id = 0
        self._steps = 0
        for name in model.sizes if sizes is None else sizes:
            self.add_size(name)

    @property
    def sizes(self) -> tuple[str, ...]:
        """Names of the sizes that take requests."""
        return tuple(name for name, served in self._sizes.copy().items() if not served.draining)

    @property
    def cache_bytes(self) -> int:
        """Bytes of all pools; they change only when sizes come and go."""
        return sum(room.pool.nbytes for room in self._pools.rooms.values())

    @property
    def busy(self) -> bool:
        """Whether a step has anything to do or to tell."""
        return bool(self._open or self._pending)

    @property
    def stats(self) -> Stats:
        """What there is to do, and what was done; safe to read on any thread."""
        sizes = {name: self._stats_of(served) for name, served in self._sizes.copy().items()}
        return Stats(
            queued=sum(size.queued for size in sizes.values()),
            running=sum(size.running for size in sizes.values()),
            cache_used=max(room.space.used for room in list(self._pools.rooms.values())),
            preemptions=self.scheduler.preemptions,
            steps=self._steps,
            sizes=sizes,
        )

    def add_size(self, name: str, fields: Fields | None = None) -> None:
        """Serve one size more: the model's own of this name, or another by its fields.

        It is a new set of views; a pool is allocated only if no size has states of its shapes.

        Raises:
            ValueError: a name that is taken; a size that the parent cannot hold, that stock classes
                cannot run in such a batch, or for whose slots a step has too few tokens.
        """
        if name in self._sizes:
            raise ValueError(f"size {name!r} is served already")
        served = self._pools.open(name, fields)
        try:
            self.scheduler.add_size(name, served.room.space)
        except ValueError:
            self._pools.close(served, list(self._sizes.values()))
            raise
        self._sizes[name] = served

    def remove_size(self, name: str) -> None:
        """Take no more requests at a size; it goes when those in flight have ended.

        Raises:
            ValueError: a size that is not served, or the last one.
        """
        self._check_size(name)
        if len(self.sizes) == 1:
            raise ValueError(f"size {name!r} is the last one")
        self._sizes[name].draining = True
        self._drop_if_drained(name)

    def submit(self, request: Request) -> int:
        """Queue a request; its id, by which `step` tells of it.

        Raises:
            ValueError: a size that is not served, a prompt that is empty, too long or of unknown
                tokens, or an answer of no token.
        """
        served = self._check_request(request)
        self._next_id += 1
        job = Job(
            self._next_id,
            request.size,
            list(request.prompt),
            len(request.prompt) + request.max_tokens,
            request.priority,
            request.salt,
        )
        self.scheduler.add(job)
        self._open[job.id] = Answer(request, job, served.end_ids, served.vocabulary)
        return job.id

    def cancel(self, id: int) -> bool:
        """End a request in whatever phase it is; False if it has ended or never was.

        Its slot is free at once; the next step tells of its end.
        """
        if id not in self._open:
            return False
        self._pending.append(self._end(Event(id, finish="cancelled")))
        return True

    def step(self) -> list[Event]:
        """Advance what the scheduler picks; the tokens and ends that come of it."""
        events, self._pending = self._pending, []
        works = self.scheduler.schedule()
        for job in self.scheduler.admitted:
            self._begin(job)
        for work in works:
            events += self._run(work)
        self._steps += bool(works)
        return events

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        size: str,
        max_tokens: int = 16,
        sampling: Sampling | None = None,
    ) -> list[list[int]]:
        """The answers to some prompts, stop ids included, while other requests go on.

        Events of other requests are kept for the next `step`.

        Raises:
            ValueError: as `submit`.
            RuntimeError: a request failed, or was cancelled.
        """
        sampling = sampling or Sampling()
        requests = [Request(prompt, size, max_tokens, sampling) for prompt in prompts]
        for request in requests:
            self._check_request(request)  # all of them before any is queued
        answers: dict[int, list[int]] = {self.submit(request): [] for request in requests}
        left, others, failed = set(answers), [], []
        while left:
            for event in self.step():
                if event.id not in answers:
                    others.append(event)
                    continue
                if event.token is not None:
                    answers[event.id].append(event.token)
                if event.finish:
                    left.remove(event.id)
                if event.finish in ("error", "cancelled"):
                    failed.append(f"request {event.id}: {event.error or event.finish}")
        self._pending = others + self._pending
        if failed:
            raise RuntimeError("; ".join(failed))
        return list(answers.values())

    def _begin(self, job: Job) -> None:
        served = self._sizes[job.size]
        served.room.begin(job)
        if len(job.tokens) == job.prompt_length:  # else it goes on where it was preempted
            served.prompt_tokens_reused += job.num_cached

    def _run(self, work: Work) -> list[Event]:
        """One forward call, and the tokens that its rows sample."""
        served = self._sizes[work.size]
        try:
            logits_BV = _forward(work, served)
        except Exception as error:  # of many kinds; the engine lives on
            if len(work.jobs) == 1:
                return [self._failed(work.jobs[0], error)]
            alone = [Work(work.size, work.count, (job,)) for job in work.jobs]
            return [event for each in alone for event in self._run(each)]
        ready = set(self.scheduler.advance(work))
        for job in work.jobs:
            served.count(job, work.count)
            served.room.keep(job)
        if not ready:
            return []
        rows = zip(work.jobs, likeliest(logits_BV), logits_BV, strict=True)
        return [self._take(served, *row) for row in rows if row[0] in ready]

    def _take(self, served: Served, job: Job, best: int | None, logits_V: Tensor) -> Event:
        """The next token of a sequence, and whether it is the last one."""
        try:
            event = self._open[job.id].take(best, logits_V)
        except Exception as error:  # as above: this request's own
            return self._failed(job, error)
        served.output_tokens += 1
        return self._end(event) if event.finish else event

    def _failed(self, job: Job, error: Exception) -> Event:
        return self._end(Event(job.id, finish="error", error=f"{type(error).__name__}: {error}"))

    def _end(self, event: Event) -> Event:
        self.scheduler.remove(event.id, failed=event.finish == "error")
        size = self._open.pop(event.id).request.size
        self._drop_if_drained(size)
        return event

    def _drop_if_drained(self, name: str) -> None:
        """Let go of a size that takes no more requests and has none."""
        scheduler = self.scheduler
        left = scheduler.num_waiting(name) + scheduler.num_running(name)
        if self._sizes[name].draining and not left:
            served = self._sizes.pop(name)
            self.scheduler.remove_size(name)
            self._pools.close(served, list(self._sizes.values()))

    def _stats_of(self, served: Served) -> SizeStats:
        return SizeStats(
            self.scheduler.num_waiting(served.name),
            self.scheduler.num_running(served.name),
            served.prompt_tokens_computed,
            served.prompt_tokens_reused,
            served.output_tokens,
        )

    def _check_size(self, name: str) -> None:
        if name not in self.sizes:
            raise ValueError(f"no size {name!r}; there are {', '.join(self.sizes)}")

    def _check_request(self, request: Request) -> Served:
        self._check_size(request.size)
        served = self._sizes[request.size]
        request.check(self.max_length, served.vocabulary)
        return served


@torch.inference_mode()
def _forward(work: Work, served: Served) -> Tensor:
    """Advance the rows by their tokens; logits (B, V) after the last."""
    rows: list[Row] = []
    for job in work.jobs:
        assert job.slot is not None
        rows.append(Row(job.slot, job.blocks, job.num_cached))
    view = served.view
    cache = Rows(served.room.pool, served.places, rows, work.count)
    ids = [job.tokens[job.num_cached : job.num_cached + work.count] for job in work.jobs]
    output = view(
        input_ids=torch.tensor(ids, device=view.device),
        attention_mask=cache.mask(view.dtype),
        position_ids=cache.positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    cache.commit()
    return output.logits[:, -1]
