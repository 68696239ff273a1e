"""A second, plain way to cut a small model out of a parent: by hand, with reshapes.

Knows the meaning of each tensor of the two block designs and shares nothing with `layout`.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from models import child_config, kept_layers, tiny_config
from torch import Tensor
from transformers import AutoModelForCausalLM


def cut(family: str, state: Mapping[str, Tensor], fields: Mapping[str, int]) -> dict[str, Tensor]:
    """The tensors of a smaller stock model out of the parent's, as copies."""
    parent, child = tiny_config(family), child_config(family, fields)
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(child).state_dict()
    kept = kept_layers(family, fields)
    return {
        name: _cut(name, state[_in_parent(name, kept)], tuple(meta.shape), parent, child)
        for name, meta in shapes.items()
    }


def _in_parent(name: str, kept: list[int]) -> str:
    return re.sub(r"layers\.(\d+)\.", lambda found: f"layers.{kept[int(found[1])]}.", name)


def _cut(name: str, tensor: Tensor, shape: tuple[int, ...], parent: Any, child: Any) -> Tensor:
    mixer = name.split(".mixer.")[-1] if ".mixer." in name else ""
    if mixer.startswith("in_proj"):
        tensor = _segments(tensor, "zxBCd", parent, child)
    elif mixer.startswith("conv1d"):
        tensor = _segments(tensor, "xBC", parent, child)
    elif mixer == "norm.weight":
        tensor = _inner(tensor, parent, child)
    elif mixer in ("dt_bias", "A_log", "D"):
        tensor = _heads(tensor, parent, child)
    elif mixer == "out_proj.weight":
        tensor = _on_columns(_inner, tensor, parent, child)
    elif "q_proj" in name:
        tensor = _queries(tensor, parent, child)
    elif "o_proj.weight" in name:
        tensor = _on_columns(_queries, tensor, parent, child)
    elif name.endswith("experts.gate_up_proj"):
        halves = [half[:, : shape[1] // 2] for half in tensor.chunk(2, dim=1)]
        tensor = torch.cat(halves, 1)
    return tensor[tuple(slice(size) for size in shape)].clone()


def _segments(tensor: Tensor, kinds: str, parent: Any, child: Any) -> Tensor:
    inner = parent.mamba_num_heads * parent.mamba_head_dim
    states = parent.n_groups * parent.ssm_state_size
    sizes = {"z": inner, "x": inner, "B": states, "C": states, "d": parent.mamba_num_heads}
    cuts = {"z": _inner, "x": _inner, "d": _heads}
    parts = tensor.split([sizes[kind] for kind in kinds])
    return torch.cat(
        [
            cuts[kind](part, parent, child) if kind in cuts else part
            for kind, part in zip(kinds, parts, strict=True)
        ]
    )


def _inner(tensor: Tensor, parent: Any, child: Any) -> Tensor:
    """Rows are (group, head of the group, channel)."""
    groups = parent.n_groups
    rows = tensor.view(
        groups, parent.mamba_num_heads // groups, parent.mamba_head_dim, *tensor.shape[1:]
    )
    rows = rows[:, : child.mamba_num_heads // groups, : child.mamba_head_dim]
    return rows.reshape(-1, *tensor.shape[1:])


def _heads(tensor: Tensor, parent: Any, child: Any) -> Tensor:
    rows = tensor.view(parent.n_groups, -1, *tensor.shape[1:])
    return rows[:, : child.mamba_num_heads // parent.n_groups].reshape(-1, *tensor.shape[1:])


def _queries(tensor: Tensor, parent: Any, child: Any) -> Tensor:
    """Rows are (KV head, query head of it, channel)."""
    groups, width = parent.num_key_value_heads, 8
    rows = tensor.view(groups, parent.num_attention_heads // groups, width, *tensor.shape[1:])
    rows = rows[:, : child.num_attention_heads // groups]
    return rows.reshape(-1, *tensor.shape[1:])


def _on_columns(
    function: Callable[[Tensor, Any, Any], Tensor], tensor: Tensor, parent: Any, child: Any
) -> Tensor:
    return function(tensor.transpose(0, 1).contiguous(), parent, child).transpose(0, 1)
