"""Fake quantization: numbers that are what codes will mean, while the weights stay as they are.

Of a size only its own corner is encoded, with the scales of the whole matrix: that is what
quantizing the whole and slicing gives (I5), at the cost of the corner and of one look at the whole
for its largest magnitude. Gradients pass straight through to the weights (arXiv 1308.3432), also
where a value was clamped: scales follow the weights, so none is out of reach for good.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from star_elastic.precision.format import Format, computed_in, largest_of
from star_elastic.shapes import Run, narrow

Cuts = Sequence[tuple[int, list[Run]]]  # (dimension, runs kept of it), as `shapes.cuts` tells


@torch.no_grad()
def fake(matrix: Tensor, form: Format, cuts: Cuts = ()) -> Tensor:
    """What the codes of a matrix stand for, or those of a corner of it, float32; no gradient.

    Args:
        matrix: (rows, columns), whole, in the dtype in which it would be stored.
        cuts: what a size keeps of it; columns in whole blocks of the format.
    """
    matrix = matrix.to(computed_in(matrix.dtype))
    with _constants_on(matrix.device):
        whole = form.whole(largest_of(matrix.flatten())) if form.has_whole else {}
        if form.block == 1:  # a row's scale comes from all of the row
            rows = form.rows(narrow(matrix, [cut for cut in cuts if cut[0] == 0]), whole)
            kept = narrow(matrix, cuts)
        else:
            kept = narrow(matrix, cuts)
            rows = form.rows(kept, whole)
        scales = {**whole, **rows}
        return form.decode(form.encode(kept, scales), scales)


def straight(weight: Tensor, value: Tensor) -> Tensor:
    """`value`, with the gradient of `weight`, of the same shape: the straight-through estimator."""
    return _Straight.apply(weight, value)


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, value: Tensor) -> Tensor:
        ctx.dtype = weight.dtype
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].to(ctx.dtype), None


def _constants_on(device: torch.device) -> AbstractContextManager[Any]:
    """Formats make their constants where torch does: on a CPU, where asking so costs as much again
    as small matrices do.
    """
    return nullcontext() if device.type == "cpu" else device
