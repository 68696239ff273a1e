"""Linear layers of few tokens, on CPUs: every core reads a part of the weight.

What torch calls for a product of one row or a few leaves the weight to one core, so that decoding
has one core's share of the memory's bandwidth. The same product as a batch of products, each with
some of the weight's rows, goes to all cores; the weight is read where it lies, gaps between a
view's rows included. `python -m bench.linear` has the figures.

Shapes: T tokens, O outputs, I inputs, P parts of the outputs.
"""

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_TOKENS = 256  # of more than these the cores share a product by themselves
_OUTPUTS = 16  # of a part at least; fewer are not worth a call
_PARTS = 4  # for each core at most, so that a part's share of a wide weight stays in its cache


class SharedLinear(nn.Linear):
    """A linear layer whose products of few tokens all cores share."""

    def forward(self, input: Tensor) -> Tensor:
        if input.numel() > _TOKENS * self.in_features:
            return super().forward(input)
        parts = parts_of(self.out_features, torch.get_num_threads())
        return linear_by_parts(input, self.weight, self.bias, parts)


def share_linears(model: nn.Module) -> None:
    """Have the linear layers of a model share their work where it pays: in float32 on a CPU.

    The class of these layers changes; weights, names and gradients stay as they are.
    """
    for module in model.modules():
        if type(module) is nn.Linear and _pays(module.weight):
            module.__class__ = SharedLinear


def _pays(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32


@cache
def parts_of(outputs: int, cores: int) -> int:
    """Into how many parts a layer of so many outputs goes; they are all equal, if they can be."""
    most = min(_PARTS * cores, outputs // _OUTPUTS)
    if cores == 1 or most < cores:
        return 1
    return next((parts for parts in range(most, cores - 1, -1) if outputs % parts == 0), most)


def linear_by_parts(input: Tensor, weight_OI: Tensor, bias_O: Tensor | None, parts: int) -> Tensor:
    """`F.linear`, up to the order of its sums, as a batch of `parts` products (..., O).

    Outputs that cannot be shared evenly are computed apart.
    """
    outputs = len(weight_OI)
    each = outputs // parts
    if parts == 1 or not each:
        return F.linear(input, weight_OI, bias_O)
    even = parts * each
    input_TI = input.reshape(-1, input.shape[-1])
    weight_PIO = weight_OI[:even].unflatten(0, (parts, each)).transpose(1, 2)
    output_PTO = torch.bmm(input_TI.expand(parts, *input_TI.shape), weight_PIO)
    output_TO = output_PTO.transpose(0, 1).flatten(1)
    if even < outputs:
        output_TO = torch.cat([output_TO, F.linear(input_TI, weight_OI[even:])], dim=1)
    if bias_O is not None:
        output_TO = output_TO + bias_O
    return output_TO.view(*input.shape[:-1], outputs)
