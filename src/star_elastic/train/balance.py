"""Experts kept busy while training: by the gate's own bias, or by a loss on the gate."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from star_elastic.train.parts import HandOver


@dataclass
class Loads:
    """What gates did in one pass: tokens per expert; logits and picks of real tokens, per gate.

    `counts` is by (parent's bias, experts of the size that ran): a small size has fewer experts.
    """

    counts: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    gates: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def add(self, name: str, picked: Tensor, experts: int) -> None:
        """Count the tokens that went to each expert."""
        load = torch.bincount(picked.flatten(), minlength=experts)
        self.counts[name, experts] = self.counts.get((name, experts), 0) + load

    def aux_loss(self, real: Tensor) -> Tensor | float:
        """The sum over gates of `aux_loss`, on real tokens (batch, length)."""
        real = real.flatten()
        return sum(aux_loss(logits[real], picked[real]) for logits, picked in self.gates)


@contextmanager
def watched(skeleton: nn.Module, real: Tensor, loads: Loads) -> Iterator[None]:
    """Watch the gates of a skeleton for one forward pass; `real` masks real tokens (batch, length).

    The hooks are gone before backward, so blocks that are computed again are not counted twice.
    """
    hooks = []
    for module in skeleton.modules():
        if isinstance(module, HandOver):
            for name, gate in module.block.named_modules():
                if name.endswith(".gate"):
                    hook = _hook(module.prefix + name, real.flatten(), loads)
                    hooks.append(gate.register_forward_hook(hook))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def aux_loss(logits: Tensor, picked: Tensor) -> Tensor:
    """Experts * sum of (share of tokens) * (mean probability): 1 when balanced, for one gate.

    Switch Transformers, arXiv 2101.03961, eq. 4 to 6; over top-k picks as stock transformers do.

    Args:
        logits: (tokens, experts); picked: (tokens, top_k).
    """
    experts = logits.shape[-1]
    share = F.one_hot(picked, experts).float().mean(0).sum(0)
    return experts * (share * logits.float().softmax(-1).mean(0)).sum()


def balance_step(bias: Tensor, load: Tensor, rate: float) -> None:
    """Aux-loss-free balancing (DeepSeek-V3, arXiv 2412.19437): raise the bias of idle experts.

    Args:
        bias: (experts,), changed in place; load: (experts,), tokens that went to each.
    """
    load = load.to(bias.dtype)
    bias += rate * torch.sign(load.mean() - load)


def _hook(gate_name: str, real: Tensor, loads: Loads) -> Any:
    def hook(gate: Any, _: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        logits, _, picked = output
        loads.add(f"{gate_name}.e_score_correction_bias", picked[real], logits.shape[-1])
        # kept as they are: what saves for backward in here would be missing in a block that is
        # computed again, when this hook is gone
        loads.gates.append((logits, picked))

    return hook
