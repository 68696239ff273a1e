"""A checkpoint's weights as parts, one tensor at a time: each process keeps only its share."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from star_elastic.checkpoint import Checkpoint
from star_elastic.tensors import dtype_of, in_memory
from star_elastic.train import distributed
from star_elastic.train.distributed import World
from star_elastic.train.parts import Parts


def load_parts(
    opened: Checkpoint,
    here: World,
    dtype: torch.dtype | None = None,
    gather: torch.dtype | None = None,
    offload: bool = False,
) -> Parts:
    """The parent's tensors as parameters, sharded over all processes.

    Args:
        dtype: of the parameters (None: as stored); gather: see `distributed.shard`.
        offload: they rest in host memory and come to the device part by part.
    """
    rest = torch.device("cpu") if offload else here.device
    empty = torch.device("meta") if here.size > 1 else rest
    layout = opened.layout
    state: dict[str, Tensor] = {}
    for name, weight in layout.weights.items():
        held = dtype_of(opened, weight) if dtype is None or weight.is_buffer else dtype
        tensor = torch.empty(weight.shape(layout.sizes), dtype=held, device=empty)
        state[name] = tensor if weight.is_buffer else nn.Parameter(tensor)
    parts = Parts(layout, state, here.device if offload and here.device != rest else None)
    if here.size > 1:
        parts = distributed.shard(parts, here, gather).to_empty(device=rest)
    targets = parts.tensors()
    for name, tensor in in_memory(opened, layout.weights.values()):
        distributed.fill(targets[name], tensor)
    return parts


def whole_state(
    parts: Parts, dtypes: Mapping[str, torch.dtype], here: World
) -> dict[str, Tensor] | None:
    """All tensors in the first process's host memory, None in the others; all must call it."""
    found = {name: t for name, t in _gathered(parts, dtypes, here)}
    return found if here.is_first else None


def _gathered(
    parts: Parts, dtypes: Mapping[str, torch.dtype], here: World
) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in parts.tensors().items():
        value = distributed.whole(tensor.detach()).to(dtypes[name])
        if here.is_first:
            yield name, value.cpu()
