"""Many processes as one: the only module that names torch.distributed.

`torchrun` starts the processes; FSDP2 shards the parent's parts from outside, experts with them
(their first dimension is the expert). Without `torchrun` a world is one process and nothing here
touches the network.
"""

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from star_elastic.folder import CheckpointError, one_line
from star_elastic.train.parts import Parts

_PATIENCE = timedelta(hours=6)  # others wait while the first ranks the parent


@dataclass(frozen=True)
class World:
    """This process among its like.

    `savers` is a group of their own: saving amid training's collectives would abort both.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    savers: Any = None

    @property
    def is_first(self) -> bool:
        """Is this the process that writes what is written once?"""
        return self.rank == 0

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over all processes, in place."""
        return self.total(tensor).div_(self.size)

    def any(self, flag: bool) -> bool:
        """Does any process say so?"""
        if self.size == 1:
            return flag
        return bool(self.total(torch.tensor(int(flag), device=self.device)).item())

    def gather(self, value: Any) -> list[Any]:
        """The (picklable) value of every process, by rank."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def world(device: str | None = None) -> Iterator[World]:
    """Join the processes that `torchrun` started; alone without it.

    Args:
        device: "cpu" or "cuda"; default: cuda if there is one.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield World(device=torch.device(kind))
        return
    local, backend = torch.device(kind), "gloo"
    if kind == "cuda":
        local, backend = torch.device(kind, int(os.environ["LOCAL_RANK"])), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(local)
    dist.init_process_group(backend, timeout=_PATIENCE)
    try:
        savers = dist.new_group(backend="gloo")
        yield World(dist.get_rank(), dist.get_world_size(), local, savers)
    finally:
        dist.destroy_process_group()


def shard(parts: Parts, here: World, gather: torch.dtype | None = None) -> Parts:
    """Spread a parent's parts over all processes, each gathered only while it runs.

    Args:
        gather: the dtype in which a part is gathered (default: as it is held).
    """
    if here.size == 1:
        return parts
    mesh = init_device_mesh(here.device.type, (here.size,))
    policy = MixedPrecisionPolicy(param_dtype=gather, reduce_dtype=torch.float32)
    for part in parts.layers:
        fully_shard(part, mesh=mesh, mp_policy=policy)
    fully_shard(parts, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    return parts


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, gathered if it is sharded: every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def fill(target: Tensor, source: Tensor) -> None:
    """Copy a whole tensor, or this process's shard of it, which every process has read."""
    if isinstance(target, DTensor):
        mesh, places = target.device_mesh, target.placements
        source = source.to(target.device)
        target.copy_(distribute_tensor(source, mesh, places, src_data_rank=None))
    else:
        target.copy_(source)


def save(state: Mapping[str, Any], folder: Path, here: World) -> "Future[Any]":
    """Write tensors (sharded or not) while training goes on; the future ends when all is on disk.

    The values are copied before this returns.
    """
    saving = dcp.async_save(
        dict(state),
        storage_writer=dcp.FileSystemWriter(folder, sync_files=True),
        process_group=here.savers,
        no_dist=here.size == 1,
    )
    assert isinstance(saving, Future)
    return saving


def load(state: Mapping[str, Any], folder: Path, here: World) -> None:
    """Read tensors back into these very ones, however many processes wrote them.

    Raises:
        CheckpointError: they are damaged, or not these.
    """
    try:
        dcp.load(
            dict(state),
            storage_reader=dcp.FileSystemReader(folder),
            process_group=here.savers,
            no_dist=here.size == 1,
        )
    except dcp.CheckpointException as error:
        raise CheckpointError(f"{folder}: no state of this run: {reason(error)}") from None


def reason(failure: BaseException) -> str:
    """What went wrong, in one line: the first process' error out of torch's pages around it."""
    if isinstance(failure, dcp.CheckpointException):
        failure = next(iter(failure.failures.values()))[0]
    return one_line(failure) if isinstance(failure, Exception) else type(failure).__name__
