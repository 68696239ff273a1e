"""The Mamba-2 chunked scan in plain PyTorch, group-aware, for devices without the fused kernel.

Same contract as the scan that stock mixers call (Mamba-2, arXiv 2405.21060, section 6), with two
differences of form: B and C stay per group instead of being repeated for every head, and every
contraction is one batched matrix product over (batch, chunk, group).

Glossary: b batch, c chunk, q position in a chunk, g group, m head of a group, p head channel,
n state. Shapes are written with these letters, e.g. `x_bcgqmp`.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def chunk_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    *,
    seq_idx: Tensor | None = None,
    **_: object,
) -> Tensor | tuple[Tensor, Tensor]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t;  y_t = C_t h_t + D x_t.

    Args:
        hidden_states: (batch, length, heads, head channels).
        dt: (batch, length, heads), before bias and softplus.
        A: (heads,), negative.
        B, C: (batch, length, groups, state).
        initial_states: (batch, heads, head channels, state); they belong to the first document.
        seq_idx: (batch, length), the document of each token; where it changes, h starts anew.

    Returns:
        (batch, length, heads, head channels) in fp32, and the last state if asked for.
    """
    batch, length, heads, channels = hidden_states.shape
    groups, state = B.shape[2:]
    per_group = heads // groups
    dt = _discretise(dt, dt_bias, dt_softplus, dt_limit)
    chunk = min(chunk_size, max(16, length))
    pad = -length % chunk
    chunks = (length + pad) // chunk

    apart = None if seq_idx is None else _documents_apart(seq_idx, chunks, chunk)

    def chunked(tensor: Tensor, *inner: int) -> Tensor:  # (b, l, ...) -> (b, c, g, q, ...)
        tensor = F.pad(tensor.float(), (0, 0) * (tensor.dim() - 2) + (0, pad))
        return tensor.view(batch, chunks, chunk, groups, *inner).transpose(2, 3)

    x_bcgqmp = chunked(hidden_states * dt[..., None], per_group, channels)
    B_bcgqn, C_bcgqn = chunked(B, state), chunked(C, state)
    decay_bcgmq = chunked(dt * A.float(), per_group).transpose(3, 4).cumsum(-1)

    scores_bcgqs = C_bcgqn @ B_bcgqn.transpose(-1, -2)
    weights_bcgmqs = scores_bcgqs[:, :, :, None] * _causal_decay(decay_bcgmq, apart)
    y_bcgmqp = weights_bcgmqs @ x_bcgqmp.transpose(3, 4)

    to_end_bcgmq = torch.exp(decay_bcgmq[..., -1:] - decay_bcgmq)
    from_start_bcgmq = torch.exp(decay_bcgmq)
    if apart is not None:
        to_end_bcgmq = to_end_bcgmq.masked_fill(apart.from_end, 0)
        from_start_bcgmq = from_start_bcgmq.masked_fill(apart.from_before, 0)
    to_end_bcgqm = to_end_bcgmq.transpose(3, 4)
    added = B_bcgqn.transpose(-1, -2) @ (x_bcgqmp * to_end_bcgqm[..., None]).flatten(4)
    added_bcgmpn = added.view(batch, chunks, groups, state, per_group, channels).movedim(3, 5)
    h_bcgmpn, last_bgmpn = _carry(added_bcgmpn, from_start_bcgmq[..., -1], initial_states)
    carried = C_bcgqn @ h_bcgmpn.movedim(5, 3).flatten(4)
    carried_bcgmqp = carried.view(batch, chunks, groups, chunk, per_group, channels).transpose(3, 4)
    y_bcgmqp = torch.addcmul(y_bcgmqp, carried_bcgmqp, from_start_bcgmq[..., None])

    y = y_bcgmqp.permute(0, 1, 4, 2, 3, 5).reshape(batch, length + pad, heads, channels)
    y = y[:, :length]
    if D is not None:
        y = y + D[:, None] * hidden_states.float()
    if not return_final_states:
        return y
    return y, last_bgmpn.reshape(batch, heads, channels, state)


def _discretise(
    dt: Tensor, bias: Tensor | None, softplus: bool, limit: tuple[float, float]
) -> Tensor:
    dt = dt if bias is None else dt + bias.to(dt.dtype)
    dt = F.softplus(dt) if softplus else dt
    if limit == (0.0, float("inf")):
        return dt  # softplus is positive: nothing to clamp
    return torch.clamp(dt, min=limit[0], max=limit[1])


class _Apart(NamedTuple):
    """Which tokens of a chunk belong to unlike documents, g and m being 1."""

    pairs: Tensor  # q and s: (b, c, 1, 1, q, s)
    from_end: Tensor  # q and the chunk's last token: (b, c, 1, 1, q)
    from_before: Tensor  # q and the last token before the chunk: (b, c, 1, 1, q)


def _documents_apart(seq_idx: Tensor, chunks: int, chunk: int) -> _Apart:
    changes = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, chunks * chunk - seq_idx.shape[1]))
    document = changes.cumsum(1).view(-1, chunks, 1, 1, chunk)  # numbers never return
    last = document[..., -1:]
    before = torch.cat([torch.zeros_like(last[:, :1]), last[:, :-1]], 1)
    pairs = document[..., :, None] != document[..., None, :]
    return _Apart(pairs, document != last, document != before)


def _causal_decay(decay_bcgmq: Tensor, apart: _Apart | None) -> Tensor:
    """exp(sum of decays between s and q) for s <= q, else 0: (b, c, g, m, q, s)."""
    chunk = decay_bcgmq.shape[-1]
    difference = decay_bcgmq[..., :, None] - decay_bcgmq[..., None, :]
    unseen = torch.ones(chunk, chunk, dtype=torch.bool, device=decay_bcgmq.device).triu(1)
    if apart is not None:
        unseen = unseen | apart.pairs
    # masked before exp: exp of a positive difference may be inf, and inf * 0 is nan in backward
    return torch.exp(difference.masked_fill(unseen, -torch.inf))


def _carry(
    added_bcgmpn: Tensor, factor_bcgm: Tensor, initial_states: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The state at the start of each chunk, and after the last."""
    h = torch.zeros_like(added_bcgmpn[:, 0])
    if initial_states is not None:
        h = initial_states.to(h.dtype).reshape(h.shape)
    factor = factor_bcgm[..., None, None]
    starts = []
    for chunk in range(added_bcgmpn.shape[1]):
        starts.append(h)
        h = torch.addcmul(added_bcgmpn[:, chunk], factor[:, chunk], h)
    return torch.stack(starts, 1), h
