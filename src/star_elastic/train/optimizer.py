"""AdamW with its moments there from the start, so that a state always has the same tensors."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn


def adamw(
    parameters: Iterable[nn.Parameter],
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) before its first step."""
    optimizer = torch.optim.AdamW(
        parameters, lr=learning_rate, betas=betas, weight_decay=weight_decay, fused=True
    )
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
            }
    return optimizer


def tensors(optimizer: torch.optim.Optimizer, names: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The moments and step counts, as `exp_avg/NAME`, ...; these very tensors."""
    return {
        f"{kind}/{name}": value
        for name, parameter in names.items()
        for kind, value in optimizer.state.get(parameter, {}).items()
    }
