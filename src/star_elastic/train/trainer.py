"""The training loop: every micro-batch at one size or several, all in the parent's own weights.

A micro-batch runs a stock model of the drawn size on *narrowed* parent weights, so it costs what
that size costs; gradients flow through the narrowing into the parent, which one AdamW updates. Now
and then a micro-batch trains the router instead, on the parent under masks.
"""

import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from star_elastic.records import Batch
from star_elastic.submodel import Fields
from star_elastic.train import curriculum, optimizer
from star_elastic.train.balance import Loads, balance_step, watched
from star_elastic.train.callbacks import Callback
from star_elastic.train.coded import Coding
from star_elastic.train.data import Stream
from star_elastic.train.distillation import Lesson, loss, predicting
from star_elastic.train.distributed import World
from star_elastic.train.diverged import DivergedError, clip, refuse_bad
from star_elastic.train.draws import Draws
from star_elastic.train.interrupt import Interrupted, stop_requests
from star_elastic.train.parts import Cut, Parts, Skeletons
from star_elastic.train.pieces import in_pieces
from star_elastic.train.recipe import Balance, Distil, Optimise
from star_elastic.train.report import Gathered, StepReport, counts, means
from star_elastic.train.routing import RouterTraining
from star_elastic.train.state import Position, States
from star_elastic.train.teacher import Teacher


class Trainer:
    """Trains all sizes of one parent in place.

    With a teacher the loss is forward KL to it, else next-token cross-entropy. `streams` makes the
    data of the n-th stage.
    """

    def __init__(
        self,
        parts: Parts,
        sizes: Mapping[str, Fields],
        settings: Optimise,
        streams: Callable[[int], Stream],
        teacher: Teacher | None = None,
        distil: Distil | None = None,
        balance: Balance | None = None,
        routing: RouterTraining | None = None,
        states: States | None = None,
        here: World | None = None,
        callbacks: Sequence[Callback] = (),
        multiple_of: Mapping[str, int] | None = None,
        coding: Coding | None = None,
    ):
        """`coding`: the codes that sizes are to learn for; without it they run as they are."""
        self.parts = parts
        self.sizes = dict(sizes)
        self.settings = settings
        self.streams = streams
        self.teacher = teacher
        self.distil = distil or Distil()
        self.balance = balance or Balance()
        self.routing = routing
        self.states = states
        self.here = here or World()
        self.callbacks = callbacks
        self.position = Position()
        self.weights = parts.tensors()
        self.parameters = [p for p in self.weights.values() if isinstance(p, nn.Parameter)]
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        for part in parts.layers:
            part.checkpointed = settings.checkpoint_activations  # type: ignore[assignment]
        self.optimizer = optimizer.adamw(
            self.parameters,
            settings.stages[0].learning_rate,
            settings.betas,
            settings.weight_decay,
        )
        self.skeletons = Skeletons(parts, coding.cut if coding else None)
        readings = len(coding.readings) if coding else 1
        self.draws = Draws(parts.layout, settings, self.sizes, multiple_of or {}, readings)
        self._stream: tuple[int, Stream] | None = None
        curriculum.check_processes(settings, self.here.size)

    def resume(self) -> bool:
        """Go on from the newest saved state, if there is one."""
        position = self.states.load(self._state()) if self.states else None
        if position is not None:
            self.position = position
            if self.routing is not None:
                self.routing.settle(self.sizes)
        return position is not None

    def run(self) -> None:
        """Train to the last step.

        Raises:
            Interrupted: on Ctrl-C or SIGTERM, once the step is done and its state on disk.
            DivergedError: a loss or gradient is not finite; the state before that step is saved.
            OSError: a state could not be written; the one before is kept.
        """
        try:
            with stop_requests() as requests:
                while self.position.step < self.settings.steps:
                    self.step()
                    if self.position.step % self.settings.save_every == 0:
                        self.save()
                    if self.here.any(requests.number is not None):
                        self.save(wait=True)
                        raise Interrupted(requests.number or 15)
            self.save(wait=True)
        except DivergedError:
            self.save(wait=True)
            raise
        finally:
            for parameter in self.parameters:
                parameter.requires_grad_(False)
                parameter.grad = None

    def save(self, wait: bool = False) -> None:
        """Write the state from which `resume` goes on, while training does."""
        if self.states is None:
            return
        if self.states.save(self.position, self._state()):
            for callback in self.callbacks:
                callback.on_save(self.position.step)
        if wait:
            self.states.wait()

    def seconds_of(self, name: str, stage: int) -> float:
        """Seconds of a stage's first micro-batch at a size, measured; nothing is learned."""
        batch = next(self.streams(stage)).to(self.here.device)
        self.skeleton(self.sizes[name])
        start = time.perf_counter()
        self._train_sizes(batch, {name: self.sizes[name]}, 1.0, 0, Gathered())
        self.optimizer.zero_grad()
        return time.perf_counter() - start

    def step(self) -> StepReport:
        """One optimizer step on the next micro-batches of the stream."""
        start = time.perf_counter()
        place = curriculum.place(self.settings, self.position.step)
        stream = self._stage_stream(place.number)
        first, count = self.position.micro_batches, place.stage.accumulate
        done = self.position.step / self.settings.steps
        routed = [self._routes(first + n, done) for n in range(count)]
        gathered = Gathered()
        shares = [self.here.size / max(1, n) for n in (count - sum(routed), sum(routed))]
        for number, batch in enumerate(stream.take(count, self._is_mine)):
            if batch is not None:
                batch = batch.to(self.here.device)
                if routed[number]:
                    self._train_router(batch, done, first + number, shares[1], gathered)
                else:
                    drawn = self.draws.of(place.stage, first + number)
                    self._train_sizes(batch, drawn, shares[0], first + number, gathered)
        rate = curriculum.learning_rate(place.stage, place.step)
        norm = self._clip(gathered)
        self._update(rate, gathered)
        tokens = int(self.here.total(torch.tensor(gathered.tokens, device=self.here.device)))
        self.position = Position(
            self.position.step + 1,
            first + count,
            self.position.tokens + tokens,
            self.position.seconds + time.perf_counter() - start,
            stream.state,
        )
        return self._report(place.number, rate, norm, gathered)

    def loss(
        self,
        batch: Batch,
        fields: Fields,
        lesson: Lesson | None,
        loads: Loads,
        reading: int = 0,
    ) -> Tensor:
        """The loss of one micro-batch at one size; differentiable in the parent's weights."""
        skeleton, cut = self.skeleton(fields, reading)

        def finish(hidden: Tensor, head: Tensor) -> Tensor:
            labels = batch.input_ids[:, 1:][batch.targets[:, 1:]]
            states = predicting(hidden, batch.targets)
            return loss(states, head, labels, lesson, self.distil)

        if not (self.balance.rate or self.balance.aux_loss):
            return self.parts(skeleton, cut, finish, **batch.inputs)
        gates = Loads()
        with watched(skeleton, batch.mask, gates):
            found = self.parts(skeleton, cut, finish, **batch.inputs)
        for key, load in gates.counts.items():
            loads.counts[key] = loads.counts.get(key, 0) + load
        if self.balance.aux_loss:
            found = found + self.balance.aux_loss * gates.aux_loss(batch.mask)
        return found

    def skeleton(self, fields: Fields, reading: int = 0) -> tuple[PreTrainedModel, Cut]:
        """The stock model of a size on `meta`, and how the parent's tensors are cut for it."""
        return self.skeletons.of(fields, reading)

    def _train_sizes(
        self,
        batch: Batch,
        sizes: Mapping[str, Fields],
        share: float,
        number: int,
        gathered: Gathered,
    ) -> None:
        stage = curriculum.place(self.settings, self.position.step).stage
        reading = self.draws.reading(number)
        lesson: Lesson | None = None
        for name, fields in sizes.items():
            if self.teacher and (lesson is None or self.teacher.own):
                with self._autocast():
                    lesson = self.teacher.lesson(batch, fields)
            total = 0.0
            for piece, taught, part in in_pieces(batch, lesson, self.draws.pieces(stage, fields)):
                with self._autocast():
                    found = self.loss(piece, fields, taught, gathered.loads, reading)
                (found * (part * share / len(sizes))).backward()
                total += part * found.item()
            gathered.add("losses", name, total, number)
        gathered.tokens += batch.tokens

    def _train_router(
        self, batch: Batch, done: float, number: int, share: float, gathered: Gathered
    ) -> None:
        assert self.routing is not None and self.teacher is not None
        with self._autocast():
            lesson = self.teacher.lesson(batch)
        found = self.routing.learn(
            batch, lesson, self.distil, done, number, share, self._autocast()
        )
        for name, value in found.items():
            gathered.add("router", name, value, number)
        gathered.tokens += batch.tokens

    def _clip(self, gathered: Gathered) -> float:
        learned = self.routing.router.parameters() if self.routing else ()
        norm = clip(self.parameters, self.settings.clip, learned, gathered)
        try:
            refuse_bad(gathered, self.position, self.here)
        except DivergedError:
            self.optimizer.zero_grad()
            raise
        return norm

    def _update(self, rate: float, gathered: Gathered) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.balance.rate:
            for (name, experts), load in gathered.loads.counts.items():
                if name in self.weights:
                    bias = self.weights[name][:experts]
                    balance_step(bias, self.here.total(load), self.balance.rate)
        if self.routing is not None and gathered.router:
            self.routing.update(self.here)
            self.routing.settle(self.sizes)

    def _report(self, stage: int, rate: float, norm: float, gathered: Gathered) -> StepReport:
        found = self.here.gather((dict(gathered.losses), dict(gathered.router)))
        losses, router = [each[0] for each in found], [each[1] for each in found]
        at = self.position
        report = StepReport(
            at.step, stage, means(losses), rate, norm, at.tokens, at.seconds, counts(losses)
        )
        report.router = means(router)
        for callback in self.callbacks:
            callback.on_step_end(report)
        return report

    def _state(self) -> dict[str, Tensor]:
        state = {f"weight/{name}": tensor.detach() for name, tensor in self.weights.items()}
        state |= optimizer.tensors(self.optimizer, self.weights)
        return state | (self.routing.state() if self.routing else {})

    def _stage_stream(self, number: int) -> Stream:
        """The stream of a stage, where this run stands in it."""
        if self._stream is None or self._stream[0] != number:
            stream = self.streams(number)
            entered = self.position.step - sum(
                stage.length for stage in self.settings.stages[:number]
            )
            if entered > 0:
                stream.seek(self.position.data)
            self._stream = number, stream
        return self._stream[1]

    def _routes(self, micro_batch: int, done: float) -> bool:
        group = micro_batch // self.settings.same_size
        return self.routing is not None and self.routing.learns(group, done)

    def _is_mine(self, number: int) -> bool:
        return number % self.here.size == self.here.rank

    def _autocast(self) -> torch.autocast:
        enabled = self.settings.dtype == "bfloat16"
        return torch.autocast(self.here.device.type, torch.bfloat16, enabled=enabled)
