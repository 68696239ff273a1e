"""Tiny folders whose weights stand as codes, in the layouts that ModelOpt and compressed-tensors
write, and what those codes mean."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from star_elastic.precision import FORMATS as OURS
from star_elastic.precision import Format, format_of

FORMATS = ["fp8", "fp8_rows", "int8", "nvfp4", "nvfp4_packed", "mxfp4", "int4"]
NAMES = [*(each.name for each in OURS), "int8_groups"]
GROUPED = ["int4", "int8_groups"]
GROUP = 8  # elements under one scale, in these tiny models
_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def quantize(folder: Path, kind: str) -> dict[str, Tensor]:
    """Turn the matrices of a folder's mixers into codes; returns the tensors as they were."""
    before = load_file(folder / "model.safetensors")
    after: dict[str, Tensor] = {}
    for name, tensor in before.items():
        inside = ".mixer." in name or ".mlp." in name or "_proj" in name
        if tensor.dim() == 2 and inside and "gate.weight" not in name:
            after |= _codes(name.removesuffix(".weight"), tensor, kind)
        else:
            after[name] = tensor
    save_file(after, folder / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((folder / "config.json").read_text())
    values["quantization_config"] = {"quant_method": kind, "ignore": ["lm_head"]}
    if "elastic_config" in values:
        values["elastic_config"]["digests"] = {}
    (folder / "config.json").write_text(json.dumps(values))
    return before


def meaning(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights that codes and scales stand for, and whatever stands as it is."""
    found = {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        scale = tensors.get(f"{module}.weight_scale")
        if leaf in ("weight", "weight_packed") and scale is not None:
            values = _unpacked(tensor, tensors.get(f"{module}.weight_shape"))
            whole = tensors.get(f"{module}.weight_scale_2", torch.tensor(1.0))
            found[f"{module}.weight"] = values * (_spread(scale, values) * whole)
        elif not leaf.startswith(("weight_", "input_")):
            found[name] = tensor
    return found


def _codes(module: str, weight: Tensor, kind: str) -> dict[str, Tensor]:
    rows, columns = weight.shape
    blocks = weight.view(rows, columns // GROUP, GROUP)
    if kind in ("fp8", "fp8_rows"):
        scale = weight.abs().amax(1, keepdim=True) if kind == "fp8_rows" else weight.abs().amax()
        scale = (scale / 448).clamp(min=1e-9)
        found = {"weight": (weight / scale).to(torch.float8_e4m3fn), "weight_scale": scale}
        return _named(module, found | ({"input_scale": torch.tensor(1.0)} if kind == "fp8" else {}))
    if kind == "int8":
        scale = (weight.abs().amax(1, keepdim=True) / 127).clamp(min=1e-9)
        return _named(
            module, {"weight": (weight / scale).round().to(torch.int8), "weight_scale": scale}
        )
    if kind == "int4":
        scale = (blocks.abs().amax(2) / 7).clamp(min=1e-9)
        codes = ((blocks / scale[..., None]).round() + 8).to(torch.int32).view(rows, -1, 8)
        packed = (codes << (4 * torch.arange(8, dtype=torch.int32))).sum(-1).to(torch.int32)
        shape = torch.tensor([rows, columns])
        return _named(
            module, {"weight_packed": packed, "weight_scale": scale, "weight_shape": shape}
        )
    scale = (blocks.abs().amax(2) / 6).clamp(min=1e-9)
    scale = scale.to(torch.float8_e4m3fn) if kind != "mxfp4" else (scale.log2().ceil() + 127).byte()
    signs = (blocks < 0).int() * 8
    steps = (blocks.abs() / _number(scale)[..., None]).nan_to_num()
    codes = signs + (steps[..., None] - _E2M1).abs().argmin(-1)
    codes = codes.view(rows, columns)
    packed = (codes[:, ::2] + 16 * codes[:, 1::2]).to(torch.uint8)
    if kind == "nvfp4":
        one = {"weight_scale_2": torch.tensor(1.0), "input_scale": torch.tensor(1.0)}
        return _named(module, {"weight": packed, "weight_scale": scale, **one})
    extra = {"weight_global_scale": torch.ones(1)} if kind == "nvfp4_packed" else {}
    return _named(module, {"weight_packed": packed, "weight_scale": scale, **extra})


def _named(module: str, found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{module}.{leaf}": tensor.contiguous() for leaf, tensor in found.items()}


def _number(scale: Tensor) -> Tensor:
    return torch.exp2(scale.float() - 127) if scale.dtype == torch.uint8 else scale.float()


def _unpacked(codes: Tensor, shape: Tensor | None) -> Tensor:
    if codes.dtype == torch.uint8:
        both = torch.stack([codes & 15, codes >> 4], -1).view(len(codes), -1).long()
        return _E2M1[both & 7] * (1 - 2 * (both >> 3))
    if codes.dtype == torch.int32:
        assert shape is not None
        bits = 32 * codes.numel() // int(shape.prod())
        shifts = bits * torch.arange(32 // bits, dtype=torch.int32)
        values = (codes[..., None] >> shifts) & (2**bits - 1)
        return (values.float() - 2 ** (bits - 1)).view(*shape.tolist())
    return codes.float()


def _spread(scale: Tensor, values: Tensor) -> Any:
    """A scale for every value: of the whole, of its row, or of its block in the row."""
    scale = _number(scale)
    if scale.dim() < 2:
        return scale
    return scale.repeat_interleave(values.shape[1] // scale.shape[1], 1)


def form_of(name: str, group: int = GROUP) -> Format:
    return format_of(name.removesuffix("_groups"), group if name in GROUPED else None)


def encoded(form: Format, weight: Tensor) -> dict[str, Tensor]:
    """Codes and scales of a whole matrix."""
    whole = form.whole(weight.abs().amax())
    scales = whole | form.rows(weight, whole)
    return {form.codes: form.encode(weight, scales), **scales}


def raw(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)
