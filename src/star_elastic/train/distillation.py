"""Losses on token positions: forward KL to the frozen teacher over the full vocabulary, or CE."""

import torch
import torch.nn.functional as F
from torch import Tensor


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student), mean over positions, in nats (Hinton et al., arXiv 1503.02531).

    Args:
        student, teacher: logits (positions, vocabulary).
    """
    expected = F.log_softmax(teacher.float(), -1)
    learned = F.log_softmax(student.float(), -1)
    return F.kl_div(learned, expected, log_target=True, reduction="batchmean")


def next_token_loss(logits: Tensor, input_ids: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of the tokens at `targets` given what came before, mean in nats.

    Args:
        logits: (batch, length, vocabulary); input_ids, targets: (batch, length).
    """
    return F.cross_entropy(predicting(logits, targets).float(), input_ids[:, 1:][targets[:, 1:]])


def predicting(logits: Tensor, targets: Tensor) -> Tensor:
    """The logits that predict the tokens at `targets`: (positions, vocabulary)."""
    return logits[:, :-1][targets[:, 1:]]


def balance_step(bias: Tensor, load: Tensor, rate: float) -> None:
    """Aux-loss-free balancing (DeepSeek-V3, arXiv 2412.19437): raise the bias of idle experts.

    Args:
        bias: (experts,), changed in place; load: (experts,), tokens that went to each.
    """
    load = load.to(bias.dtype)
    bias += rate * torch.sign(load.mean() - load)
