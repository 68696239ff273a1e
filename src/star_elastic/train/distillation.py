"""Losses on final hidden states, over the full vocabulary, a chunk of positions at a time.

No tensor of all logits exists: each chunk's are made from hidden states, used, and made again in
the backward pass. However many sizes learn from a micro-batch, the teacher runs once.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from star_elastic.train.recipe import Distil

_LOGITS = 2**26  # logits that may exist at once, per model


@dataclass(frozen=True)
class Lesson:
    """What the teacher says of some positions: hidden states (positions, width), and its head."""

    hidden: Tensor
    head: Tensor


def predicting(states: Tensor, targets: Tensor) -> Tensor:
    """What predicts the tokens at `targets`, (batch, length, ...) -> (positions, ...)."""
    return states[:, :-1][targets[:, 1:]]


def loss(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    lesson: Lesson | None,
    settings: Distil,
    logits: int = _LOGITS,
) -> Tensor:
    """The loss of one size on one micro-batch, mean over positions, in nats.

    With a lesson: temperature^2 * KL(teacher || student) at that temperature (Hinton et al., arXiv
    1503.02531) plus the weighted terms of `settings`; without: next-token cross-entropy.

    Args:
        hidden: (positions, hidden); head: (vocabulary, hidden); labels: (positions,).
        logits: how many logits may exist at once.
    """
    positions, vocabulary = len(hidden), len(head)
    chunk = max(1, logits // vocabulary)
    total = hidden[:0].float().sum()  # no position is no loss, and no gradient, but a graph
    for start in range(0, positions, chunk):
        rows = slice(start, start + chunk)
        part = None if lesson is None else Lesson(lesson.hidden[rows], lesson.head)
        if positions > chunk:
            arguments = (hidden[rows], head, labels[rows], part, settings)
            total = total + checkpoint(_chunk_loss, *arguments, use_reentrant=False)
        else:
            total = total + _chunk_loss(hidden, head, labels, part, settings)
    total = total / max(1, positions)
    if lesson is not None and settings.hidden:
        total = total + settings.hidden * hidden_distance(hidden, lesson.hidden)
    return total


def forward_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) summed over positions, in nats; logits (positions, vocabulary)."""
    expected = F.log_softmax(teacher.float() / temperature, -1)
    learned = F.log_softmax(student.float() / temperature, -1)
    return F.kl_div(learned, expected, log_target=True, reduction="sum")


def hidden_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance to the teacher's leading channels, over their power (no unit).

    Nested order makes the student's channels the teacher's first ones: no projection is learned.
    """
    expected = teacher[:, : student.shape[1]].float()
    return (student.float() - expected).square().sum() / expected.square().sum().clamp(min=1e-12)


def _chunk_loss(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    lesson: Lesson | None,
    settings: Distil,
) -> Tensor:
    student = F.linear(hidden, head)
    if lesson is None:
        return F.cross_entropy(student.float(), labels, reduction="sum")
    with torch.no_grad():
        teacher = F.linear(lesson.hidden, lesson.head)
    total = settings.temperature**2 * forward_kl(student, teacher, settings.temperature)
    if settings.cross_entropy:
        said = F.cross_entropy(student.float(), labels, reduction="sum")
        total = total + settings.cross_entropy * said
    return total
