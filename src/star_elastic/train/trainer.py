"""The training loop: every micro-batch at one size, all sizes in the parent's own weights.

A micro-batch runs a stock model of the drawn size on *narrowed* parent weights, so it costs what
that size costs; gradients flow through the narrowing into the parent, which one AdamW updates.
"""

import math
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from star_elastic import stock
from star_elastic.model import ElasticModel
from star_elastic.records import Batch
from star_elastic.train.data import Batches
from star_elastic.train.distillation import (
    balance_step,
    forward_kl,
    next_token_loss,
    predicting,
)
from star_elastic.train.interrupt import interrupts_held
from star_elastic.train.recipe import Optimise
from star_elastic.train.state import Position, load_state, save_state

# (bias, experts of the size) -> tokens that went to each expert in this step
Loads = dict[tuple[str, int], Tensor]


@dataclass
class StepReport:
    """What one optimizer step did: mean loss per size drawn, gradient norm, pace."""

    step: int
    losses: dict[str, float]
    learning_rate: float
    grad_norm: float
    tokens: int
    seconds: float
    sizes: dict[str, int] = field(default_factory=dict)  # micro-batches per size


OnStep = Callable[[StepReport], None]


def _ignore(_: StepReport) -> None:
    """Nobody listens."""


class Trainer:
    """Trains all sizes of one parent in place.

    With a teacher the loss is forward KL to its logits, else next-token cross-entropy.
    """

    def __init__(
        self,
        model: ElasticModel,
        teacher: PreTrainedModel | None,
        batches: Batches,
        settings: Optimise,
        state_folder: Path | None = None,
    ):
        self.model = model
        self.teacher = None if teacher is None else stock.use_chunk_scan(teacher.eval())
        self.batches = batches
        self.settings = settings
        self.state_folder = state_folder
        self.position = Position()
        self.weights = model.state
        self.device = next(iter(self.weights.values())).device
        parameters = [p for p in self.weights.values() if isinstance(p, nn.Parameter)]
        for parameter in parameters:
            parameter.requires_grad_(True)
        self.optimizer = torch.optim.AdamW(
            parameters,
            lr=settings.learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self.parameters = parameters
        probs = settings.size_probs or dict.fromkeys(model.sizes, 1.0)
        self.probs = [probs.get(name, 0.0) for name in model.sizes]
        self.skeletons = {name: self._skeleton(name) for name in model.sizes}

    def resume(self) -> bool:
        """Go on from the newest saved state, if there is one."""
        if self.state_folder is None:
            return False
        position = load_state(self.state_folder, self.weights, self.optimizer)
        self.position = position or self.position
        return position is not None

    def run(self, on_step: OnStep = _ignore) -> None:
        """Train to the last step. An interrupt saves the state of the last whole step first."""
        stream = self.batches.after(self.position.micro_batches)
        try:
            while self.position.step < self.settings.steps:
                self.step(stream, on_step)
                if self.position.step % self.settings.save_every == 0:
                    self.save()
        except KeyboardInterrupt:
            self.save()
            raise
        finally:
            for parameter in self.parameters:
                parameter.requires_grad_(False)
                parameter.grad = None

    def save(self) -> None:
        """Write the state from which `resume` goes on."""
        if self.state_folder is not None:
            with interrupts_held():
                save_state(self.state_folder, self.position, self.weights, self.optimizer)

    def drawn(self, micro_batch: int) -> str:
        """The size of the n-th micro-batch; the seed decides, so that a resume draws alike."""
        draw = random.Random(f"size/{self.settings.seed}/{micro_batch}")
        return draw.choices(list(self.model.sizes), self.probs)[0]

    def loss(self, batch: Batch, size: str) -> Tensor:
        """The loss of one micro-batch at one size; differentiable in the parent's weights."""
        tensors = self.model.narrowed(self.model.sizes[size].config)
        inputs = {"input_ids": batch.input_ids, "use_cache": False}
        with self._autocast():
            logits = functional_call(self.skeletons[size], tensors, kwargs=inputs).logits
        if self.teacher is None:
            return next_token_loss(logits, batch.input_ids, batch.targets)
        with torch.no_grad(), self._autocast():
            target = predicting(self.teacher(**inputs).logits, batch.targets)
        return forward_kl(predicting(logits, batch.targets), target)

    def step(self, stream: Iterator[Batch], on_step: OnStep = _ignore) -> StepReport:
        """One optimizer step on the next micro-batches of a stream, reported to `on_step`."""
        start = time.perf_counter()
        losses: dict[str, list[float]] = defaultdict(list)
        loads: Loads = {}
        micro_batches, tokens = self.position.micro_batches, self.position.tokens
        for _ in range(self.settings.accumulate):
            batch, size = next(stream).to(self.device), self.drawn(micro_batches)
            with self._counted(size, batch, loads):
                loss = self.loss(batch, size)
            (loss / self.settings.accumulate).backward()
            losses[size].append(loss.item())
            micro_batches, tokens = micro_batches + 1, tokens + batch.tokens
        norm = nn.utils.clip_grad_norm_(self.parameters, self.settings.clip).item()
        rate = learning_rate(self.settings, self.position.step)
        seconds = self.position.seconds + time.perf_counter() - start
        mean = {size: sum(values) / len(values) for size, values in losses.items()}
        counts = {size: len(values) for size, values in losses.items()}
        step = self.position.step + 1
        report = StepReport(step, mean, rate, norm, tokens, seconds, counts)
        with interrupts_held():  # weights, moments, biases, position and log move together
            self._update(rate, loads)
            self.position = Position(step, micro_batches, tokens, seconds)
            on_step(report)
        return report

    def _update(self, rate: float, loads: Loads) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        for (name, experts), load in loads.items():
            balance_step(self.weights[name][:experts], load, self.settings.balance_rate)

    def _skeleton(self, name: str) -> PreTrainedModel:
        model = self.model.submodel(**self.model.sizes[name].config)
        return stock.use_chunk_scan(model.train())

    def _autocast(self) -> torch.autocast:
        enabled = self.settings.dtype == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    @contextmanager
    def _counted(self, size: str, batch: Batch, loads: Loads) -> Iterator[None]:
        """Count the tokens each expert gets in one forward pass, if gates are to be balanced."""
        hooks = []
        real = batch.mask.flatten()
        modules = self.skeletons[size].named_modules() if self.settings.balance_rate else ()
        for module_name, module in modules:
            if hasattr(module, "e_score_correction_bias"):
                name = f"{module_name}.e_score_correction_bias"

                def hook(
                    gate: nn.Module, _: object, output: tuple[Tensor, ...], name: str = name
                ) -> None:
                    experts = cast(int, gate.num_experts)
                    load = torch.bincount(output[2][real].flatten(), minlength=experts)
                    loads[name, experts] = loads.get((name, experts), 0) + load

                hooks.append(module.register_forward_hook(hook))
        try:
            yield
        finally:
            for handle in hooks:
                handle.remove()


def learning_rate(settings: Optimise, step: int) -> float:
    """Linear warm-up, then a cosine towards `min_lr_ratio` of the peak."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    low = settings.min_lr_ratio
    return settings.learning_rate * (low + (1 - low) * (1 + math.cos(math.pi * done)) / 2)
