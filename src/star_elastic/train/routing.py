"""A router while it learns: now and then a micro-batch runs on the parent under its masks."""

import random
from collections.abc import Mapping, MutableMapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from star_elastic.records import Batch
from star_elastic.submodel import Fields
from star_elastic.train import optimizer
from star_elastic.train.distillation import Lesson, loss, predicting
from star_elastic.train.distributed import World
from star_elastic.train.masks import Masked, masked_skeleton
from star_elastic.train.parts import Parts
from star_elastic.train.recipe import Distil
from star_elastic.train.router import Router


class RouterTraining:
    """Trains a router beside a parent; the parent's weights stay out of it.

    Args:
        budgets: size name -> its share of the parent's cost; the router chooses their fields.
    """

    def __init__(self, router: Router, parts: Parts, budgets: Mapping[str, float], seed: int = 0):
        self.router = router
        self.parts = parts
        self.budgets = dict(budgets)
        self.seed = seed
        layers = range(len(parts.layout.blocks))
        self.skeleton = parts.connect(masked_skeleton(parts.layout), layers)
        self.optimizer = optimizer.adamw(
            router.parameters(), router.settings.learning_rate, (0.9, 0.99), 0.0
        )

    def learns(self, group: int, done: float) -> bool:
        """Does the n-th draw of sizes train the router? `done` is the share of the run behind."""
        every = self.router.settings.every
        return group % every == every - 1 and done < self.router.settings.until

    def learn(
        self,
        batch: Batch,
        lesson: Lesson,
        distil: Distil,
        done: float,
        micro_batch: int,
        share: float,
        precision: AbstractContextManager[Any],
    ) -> dict[str, float]:
        """Gradients from one micro-batch at one budget; the losses, by kind.

        Args:
            done: share of the run behind; share: this micro-batch's weight in the step.
            precision: what the parent runs under (autocast).
        """
        draw = random.Random(f"router/{self.seed}/{micro_batch}")
        name = draw.choice(list(self.budgets))
        budget = self.budgets[name]
        noise = torch.Generator().manual_seed(draw.getrandbits(63))
        annealed = min(1.0, done / self.router.settings.until)
        probabilities = self.router.draw(budget, annealed, noise)

        def finish(hidden: Tensor, head: Tensor) -> Tensor:
            labels = batch.input_ids[:, 1:][batch.targets[:, 1:]]
            return loss(predicting(hidden, batch.targets), head, labels, lesson, distil)

        cut = Masked(self.parts.layout, self._placed(self.router.masks(probabilities)))
        with precision:
            kl = self.parts(self.skeleton, cut, finish, **batch.inputs)
        miss = self.router.budget_loss(probabilities, budget)
        (share * (kl.to(miss.device) + self.router.settings.weight * miss)).backward()
        return {f"{name}/loss": kl.item(), f"{name}/budget": miss.item()}

    def update(self, here: World) -> None:
        """Take a step on the gradients gathered, the same in every process."""
        for parameter in self.router.parameters():
            if parameter.grad is not None:
                here.mean(parameter.grad)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def settle(self, sizes: MutableMapping[str, Fields]) -> None:
        """Give the sizes that are budgets the fields the router chooses today."""
        for name, budget in self.budgets.items():
            sizes[name] = self.router.fields(budget)

    def state(self) -> dict[str, Tensor]:
        """The router's tensors and moments, as they are."""
        named = {f"router/{n}": p for n, p in self.router.named_parameters()}
        held = {f"weight/{name}": tensor.detach() for name, tensor in named.items()}
        return held | optimizer.tensors(self.optimizer, named)

    def _placed(self, masks: dict[str, object]) -> dict[str, object]:
        device = next(iter(self.parts.tensors().values())).device

        def place(mask: object) -> object:
            if isinstance(mask, list):
                return [place(each) for each in mask]
            assert isinstance(mask, Tensor)
            return mask.to(device)

        return {symbol: place(mask) for symbol, mask in masks.items()}
