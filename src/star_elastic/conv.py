"""The Mamba mixers' causal convolution for packed rows, for devices without the fused kernel.

The stock function knows no documents. Here those of a row are set apart by as many zeros as the
kernel looks back, which is what each would see if it stood alone; the stock function does the rest.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.nemotron_h import modeling_nemotron_h


def causal_conv1d_fn(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    seq_idx: Tensor | None = None,
    **_: object,
) -> Tensor:
    """A depthwise convolution that looks back only, and not beyond a token's own document.

    Args:
        hidden_states: (batch, channels, length).
        weight: (channels, kernel).
        bias: (channels,).
        activation: name of a function applied to the result.
        seq_idx: (batch, length), the document of each token; neighbours of unlike number are apart.

    Returns:
        (batch, channels, length).
    """
    if seq_idx is None:
        return modeling_nemotron_h.causal_conv1d_fn(
            hidden_states, weight, bias, activation=activation
        )
    batch, channels, length = hidden_states.shape
    place, width = _places(seq_idx, gap=weight.shape[-1] - 1)
    rows = hidden_states.transpose(1, 2).reshape(batch * length, channels)
    apart = rows.new_zeros(batch * width, channels).index_copy(0, place, rows)
    apart = apart.view(batch, width, channels).transpose(1, 2)
    out = modeling_nemotron_h.causal_conv1d_fn(apart, weight, bias, activation=activation)
    out = out.transpose(1, 2).reshape(batch * width, channels).index_select(0, place)
    return out.view(batch, length, channels).transpose(1, 2)


def _places(seq_idx: Tensor, gap: int) -> tuple[Tensor, int]:
    """Where each token goes when documents stand `gap` apart, (batch * length,), in wider rows."""
    batch, length = seq_idx.shape
    before = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0)).cumsum(1)
    width = length + gap * int(before.max())
    row = torch.arange(batch, device=seq_idx.device)[:, None] * width
    place = row + torch.arange(length, device=seq_idx.device) + gap * before
    return place.flatten(), width
