"""The teacher: a frozen model that runs once per micro-batch, whatever learns from it."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from star_elastic.records import Batch
from star_elastic.submodel import Fields
from star_elastic.train.distillation import Lesson, predicting
from star_elastic.train.parts import Cut, Parts, Skeletons


class Teacher:
    """A parent that says what each position should predict: whole, or cut to the learner's size."""

    def __init__(self, parts: Parts, own: bool = False):
        """`own`: every size learns from the teacher's own of that size."""
        self.parts = parts.requires_grad_(False)
        self.own = own
        self._skeletons = Skeletons(parts)

    @torch.no_grad()
    def lesson(self, batch: Batch, fields: Fields | None = None) -> Lesson:
        """Hidden states of the positions that predict a target; no logits yet.

        Args:
            fields: the size that learns, which counts only where each has its own teacher.
        """
        skeleton, cut = self.skeleton(fields if self.own and fields else {})

        def finish(hidden: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
            return predicting(hidden, batch.targets), head

        return Lesson(*self.parts(skeleton, cut, finish, **batch.inputs))

    def skeleton(self, fields: Fields) -> tuple[PreTrainedModel, Cut]:
        """The stock model of a size on `meta`, and how it is cut."""
        skeleton, cut = self._skeletons.of(fields)
        return skeleton.eval(), cut
