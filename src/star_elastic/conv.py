"""The Mamba mixers' causal convolution for packed rows, for devices without the fused kernel.

The stock function knows no documents. Here each tap of the kernel is a shifted product in which
tokens of another document count as the zeros they would be if the document stood alone.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.activations import ACT2FN
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
        seq_idx: (batch, length), the document of each token, each a run of equal numbers.

    Returns:
        (batch, channels, length).
    """
    if seq_idx is None:
        return modeling_nemotron_h.causal_conv1d_fn(
            hidden_states, weight, bias, activation=activation
        )
    x_blc, kernel = hidden_states.transpose(1, 2), weight.shape[1]
    y_blc = x_blc * weight[:, -1] if bias is None else torch.addcmul(bias, x_blc, weight[:, -1])
    for back in range(1, min(kernel, x_blc.shape[1])):
        same = (seq_idx[:, back:] == seq_idx[:, :-back])[..., None]
        past = x_blc[:, :-back] * same * weight[:, -1 - back]
        y_blc = y_blc + F.pad(past, (0, 0, back, 0))
    return (y_blc if activation is None else ACT2FN[activation](y_blc)).transpose(1, 2)
