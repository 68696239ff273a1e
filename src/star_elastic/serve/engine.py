"""Continuous batching of every size: requests in, tokens out, step by step.

One step makes a forward call per size and chunk length over the rows that the scheduler picked;
the models are stock views of one parent. A sequence's tokens do not depend on what else is in the
batch. A request that fails, fails alone: a call that raises is made again row by row.

The engine is synchronous and belongs to one thread.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from star_elastic.model import ElasticModel
from star_elastic.serve.cache import Geometry, Places, Pool, Row, Rows, check_rows
from star_elastic.serve.sampling import Sampling, choose
from star_elastic.serve.scheduler import Job, Scheduler, Space, Work


@dataclass(frozen=True)
class Request:
    """A prompt of token ids for one size, pinned."""

    prompt: Sequence[int]
    size: str
    max_tokens: int = 16
    sampling: Sampling = field(default_factory=Sampling)
    priority: int = 0  # lower goes first


@dataclass(frozen=True)
class Event:
    """A token of a request, or its end, or both at once.

    `finish` is None while it goes on, then "stop" (the token is a stop id), "length", "cancelled"
    or "error" (and `error` says which).
    """

    id: int
    token: int | None = None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    finish: str | None = None
    error: str | None = None


@dataclass
class _Open:
    """A request that is not finished yet."""

    request: Request
    job: Job
    stop_ids: frozenset[int]
    generator: torch.Generator | None


class Engine:
    """Serves the named sizes of a model from its one copy of the weights."""

    def __init__(
        self,
        model: ElasticModel,
        slots: int = 8,
        max_length: int = 2048,
        cache_tokens: int | None = None,
        step_tokens: int = 512,
        block_size: int = 16,
        sizes: Sequence[str] | None = None,
    ):
        """Allocate all caches.

        Args:
            slots: sequences at once, in each pool of sizes with equal cache shapes.
            max_length: tokens of prompt and answer together.
            cache_tokens: tokens of all sequences of a pool together, as many as its slots could
                take if None.
            step_tokens: tokens computed in one step, of all sequences together.
            sizes: names to serve; all if None.

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
        self.max_length = max_length
        self._views: dict[str, PreTrainedModel] = {}
        self._places: dict[str, Places] = {}
        for name in model.sizes if sizes is None else sizes:
            if name not in model.sizes:
                raise ValueError(f"no size {name!r}; there are {', '.join(model.sizes)}")
            check_rows(model[name].config, max_length)
            self._views[name] = model[name]
            self._places[name] = Places.of(model.layout, model.sizes[name].config)
        geometries = list(dict.fromkeys(place.geometry for place in self._places.values()))
        # every sequence may leave its last block part empty
        blocks = tokens // block_size + slots
        self._pools = [self._pool(model, g, slots, blocks, block_size) for g in geometries]
        self._pool_of = {name: geometries.index(p.geometry) for name, p in self._places.items()}
        spaces = [Space(slots, blocks, block_size) for _ in geometries]
        self.scheduler = Scheduler(self._pool_of, spaces, step_tokens)
        self._open: dict[int, _Open] = {}
        self._pending: list[Event] = []
        self._next_id = 0

    @property
    def cache_bytes(self) -> int:
        """Bytes of all pools, allocated once and for all."""
        return sum(pool.nbytes for pool in self._pools)

    @property
    def busy(self) -> bool:
        """Whether a step has anything to do or to tell."""
        return bool(self._open or self._pending)

    def submit(self, request: Request) -> int:
        """Queue a request; its id, by which `step` tells of it.

        Raises:
            ValueError: a size that is not served, a prompt that is empty, too long or of unknown
                tokens, or an answer of no token.
        """
        self._check_request(request)
        view = self._views[request.size]
        stop_ids = request.sampling.stop_ids
        self._next_id += 1
        length = len(request.prompt) + request.max_tokens
        job = Job(self._next_id, request.size, list(request.prompt), length, request.priority)
        self.scheduler.add(job)
        self._open[job.id] = _Open(
            request,
            job,
            _end_ids(view) if stop_ids is None else stop_ids,
            request.sampling.generator(),
        )
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
        for work in self.scheduler.schedule():
            events += self._run(work)
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

    def _run(self, work: Work) -> list[Event]:
        """One forward call, and the tokens that its rows sample."""
        try:
            logits_BV = self._forward(work)
        except Exception as error:  # of many kinds; the engine lives on
            if len(work.jobs) == 1:
                return [self._failed(work.jobs[0], error)]
            alone = [Work(work.size, work.count, (job,)) for job in work.jobs]
            return [event for each in alone for event in self._run(each)]
        ready = self.scheduler.advance(work)
        rows = dict(zip(work.jobs, logits_BV, strict=True))
        return [self._sample(job, rows[job]) for job in ready]

    @torch.inference_mode()
    def _forward(self, work: Work) -> Tensor:
        """Advance the rows by their tokens; logits (B, V) after the last, float32 on the CPU."""
        view, pool = self._views[work.size], self._pools[self._pool_of[work.size]]
        rows: list[Row] = []
        for job in work.jobs:
            assert job.slot is not None
            if job.num_cached == 0:
                pool.clear(job.slot)
            rows.append(Row(job.slot, job.blocks, job.num_cached))
        cache = Rows(pool, self._places[work.size], rows, work.count)
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
        return output.logits[:, -1].float().cpu()

    def _sample(self, job: Job, logits_V: Tensor) -> Event:
        """The next token of a sequence, and whether it is the last one."""
        open_ = self._open[job.id]
        request, prompt = open_.request, len(open_.request.prompt)
        try:
            choice = choose(
                logits_V, request.sampling, request.prompt, job.tokens[prompt:], open_.generator
            )
        except Exception as error:  # as above: this request's own
            return self._failed(job, error)
        job.tokens.append(choice.token)
        finish = None
        if choice.token in open_.stop_ids:
            finish = "stop"
        elif len(job.tokens) == prompt + request.max_tokens:
            finish = "length"
        event = Event(job.id, choice.token, choice.logprob, choice.top, finish)
        return self._end(event) if finish else event

    def _failed(self, job: Job, error: Exception) -> Event:
        return self._end(Event(job.id, finish="error", error=f"{type(error).__name__}: {error}"))

    def _end(self, event: Event) -> Event:
        self.scheduler.remove(event.id)
        del self._open[event.id]
        return event

    def _check_request(self, request: Request) -> None:
        if request.size not in self._views:
            raise ValueError(f"no size {request.size!r}; there are {', '.join(self._views)}")
        if not request.prompt:
            raise ValueError("prompt: no token")
        if request.max_tokens < 1:
            raise ValueError(f"max_tokens {request.max_tokens}: must be at least 1")
        length = len(request.prompt) + request.max_tokens
        if length > self.max_length:
            raise ValueError(f"{length} tokens of prompt and answer: at most {self.max_length}")
        vocabulary = self._views[request.size].config.get_text_config().vocab_size
        for token in (*request.prompt, *request.sampling.logit_bias):
            if not 0 <= token < vocabulary:
                raise ValueError(f"token {token}: the vocabulary has {vocabulary}")

    @staticmethod
    def _pool(
        model: ElasticModel, geometry: Geometry, slots: int, blocks: int, block_size: int
    ) -> Pool:
        parent = model.parent
        return Pool(geometry, slots, blocks, block_size, parent.dtype, parent.device)


def _end_ids(view: PreTrainedModel) -> frozenset[int]:
    """The tokens that end an answer, by the checkpoint."""
    ids = getattr(view.generation_config, "eos_token_id", None)
    if ids is None:
        return frozenset()
    return frozenset([ids] if isinstance(ids, int) else ids)
