"""What a quantized folder says of itself, to every engine that reads it."""

from collections.abc import Sequence
from typing import Any

from star_elastic.precision import Format, Groups

# Weights only: there is no `input_scale`, which engines want for the algorithm named `NVFP4`
# (activations in four bits too) and would take from memory that nobody wrote.
_NVFP4 = "W4A16_NVFP4"
_WHOLE = {"fp8": ("float", "tensor"), "int8": ("int", "channel")}  # no groups: type, strategy


def config_of(form: Format, ignore: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` of `config.json`: compressed-tensors', or ModelOpt's for NVFP4.

    Activations of FP8 and INT8 are quantized as they come, per token: kernels for codes of eight
    bits want both sides. Those beside groups of columns and NVFP4 stay as they are.
    """
    if form.name == "nvfp4":
        return {
            "quant_method": "modelopt",
            "quant_algo": _NVFP4,
            "group_size": form.block,
            "kv_cache_quant_algo": None,
            "ignore": list(ignore),
        }
    weights: dict[str, Any] = {"symmetric": True, "dynamic": False}
    group: dict[str, Any] = {"targets": ["Linear"], "weights": weights}
    if isinstance(form, Groups):
        layout = "pack-quantized"
        weights |= {"num_bits": form.bits, "type": "int", "strategy": "group"}
        weights["group_size"] = form.block
    else:
        kind, strategy = _WHOLE[form.name]
        layout = f"{kind}-quantized"
        weights |= {"num_bits": 8, "type": kind, "strategy": strategy}
        token = {"strategy": "token", "symmetric": True, "dynamic": True}
        group["input_activations"] = {"num_bits": 8, "type": kind, **token}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(ignore),
    }


def beside(form: Format, ignore: Sequence[str]) -> dict[str, Any] | None:
    """The content of `hf_quant_config.json`, ModelOpt's own file; vLLM requires all its keys."""
    if form.name != "nvfp4":
        return None
    return {
        "producer": {"name": "star-elastic"},
        "quantization": {
            "quant_algo": _NVFP4,
            "kv_cache_quant_algo": None,
            "group_size": form.block,
            "exclude_modules": list(ignore),
        },
    }
