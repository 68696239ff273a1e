"""The teacher: a frozen model that runs once per micro-batch, whatever learns from it."""

import torch
from torch import Tensor

from star_elastic.records import Batch
from star_elastic.train.distillation import Lesson, predicting
from star_elastic.train.parts import Narrowed, Parts


class Teacher:
    """A whole parent that says what each position should predict."""

    def __init__(self, parts: Parts):
        self.parts = parts.requires_grad_(False)
        self.skeleton = parts.skeleton({}).eval()
        self.cut = Narrowed(parts.layout, parts.layout.sizes)

    @torch.no_grad()
    def lesson(self, batch: Batch) -> Lesson:
        """Hidden states of the positions that predict a target; no logits yet."""

        def finish(hidden: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
            return predicting(hidden, batch.targets), head

        return Lesson(*self.parts(self.skeleton, self.cut, finish, **batch.inputs))
