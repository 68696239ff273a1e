"""What a run needs to go on as if it had never stopped: weights, optimizer, position (I8)."""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from star_elastic.folder import atomic_folder, read_json, write_json

_TENSORS, _POSITION = "state.safetensors", "state.json"


@dataclass
class Position:
    """How far a run has come. Data and size draws are functions of `micro_batches` and the seed."""

    step: int = 0
    micro_batches: int = 0
    tokens: int = 0
    seconds: float = 0.0


def save_state(
    folder: Path, position: Position, weights: dict[str, Tensor], optimizer: torch.optim.Optimizer
) -> None:
    """Write `folder/step-N`, then drop older ones: there is a whole state at every instant."""
    tensors = {f"weight/{name}": tensor.detach() for name, tensor in weights.items()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    names = {id(tensor): name for name, tensor in weights.items()}
    for parameter in parameters:
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}/{names[id(parameter)]}"] = value
    target = folder / f"step-{position.step:08d}"
    with atomic_folder(target, overwrite=True) as temporary:
        save_file({k: v.contiguous() for k, v in tensors.items()}, temporary / _TENSORS)
        write_json(temporary / _POSITION, asdict(position))
    for older in _states(folder):
        if older != target:
            shutil.rmtree(older)


def load_state(
    folder: Path, weights: dict[str, Tensor], optimizer: torch.optim.Optimizer
) -> Position | None:
    """Restore the newest state into these very tensors; None if there is none."""
    states = _states(folder)
    if not states:
        return None
    tensors = load_file(states[-1] / _TENSORS)
    with torch.no_grad():
        for name, tensor in weights.items():
            tensor.copy_(tensors.pop(f"weight/{name}"))
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        optimizer.state[weights[name]][kind] = value
    return Position(**read_json(states[-1] / _POSITION))


def _states(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"))
