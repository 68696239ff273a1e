"""The gradient is clipped; what is no longer finite stops a run, with its place named."""

import math
from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from star_elastic.train.distributed import World, whole
from star_elastic.train.report import Gathered
from star_elastic.train.state import Position


class DivergedError(ValueError):
    """A loss or a gradient is no longer finite: step, sizes and micro-batches are named."""


def clip(
    parameters: Sequence[Tensor], most: float, learned: Iterable[Tensor], gathered: Gathered
) -> float:
    """Clip the parent's gradient and return its norm before that; note what is not finite.

    Args:
        learned: the router's parameters, whose gradient is only looked at.
    """
    norm = whole(nn.utils.clip_grad_norm_(parameters, most)).item()
    routed = nn.utils.get_total_norm([p.grad for p in learned if p.grad is not None]).item()
    for of, value in (
        (f"after sizes {', '.join(gathered.losses)}", norm),
        ("of the router", routed),
    ):
        if not math.isfinite(value) and not gathered.bad:
            gathered.bad.append(f"gradient norm {value} {of}")
    return norm


def refuse_bad(gathered: Gathered, position: Position, here: World) -> None:
    """Stop if any process has noted something.

    Raises:
        DivergedError: naming all of it.
    """
    if here.any(bool(gathered.bad)):
        bad = [line for lines in here.gather(gathered.bad) for line in lines]
        raise DivergedError(
            f"step {position.step + 1} (from micro-batch {position.micro_batches}): "
            f"{'; '.join(bad)}; the state before it is kept"
        )
