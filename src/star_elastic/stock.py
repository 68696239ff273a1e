"""Stock transformers classes, with their known faults worked round in this one place.

- Mixers of Nemotron-H clamp dt at the config's *initialisation* minimum when they prefill, and not
  at all when they decode (transformers <= 5.23). `mend` sets the config's own `time_step_limit`.
- Their scan without the fused kernel is a slow reference. `use_chunk_scan` gives a model ours.
- `save_pretrained` drops the legacy layer pattern that older readers want; `config_json` does not.
- `batched_mm` experts copy every selected expert's weights per token: 40 x slower on a CPU;
  `grouped_mm` ones crash on rows that are no multiple of 16 bytes. Both give way to `eager`.
- Mamba mixers zero padding before `in_proj`: with a bias there, left padding leaks into the first
  real tokens. `pads_exactly` tells which models may be batched with padding.
"""

import inspect
import types
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer
from transformers.utils import logging

from star_elastic.layout import head_dim
from star_elastic.scan import chunk_scan

_SMALLEST_STEP, _LARGEST_STEP = 1e-30, 3e38


def build(config: Any, device: str | None = None) -> PreTrainedModel:
    """A stock causal LM of this config; on `meta` nothing is allocated or initialised."""
    context: AbstractContextManager[Any] = torch.device(device) if device else nullcontext()
    with context:
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(config, "dtype", None))
    return mend(model)


def quiet() -> None:
    """Silence loading bars and hints at fused kernels; for programs, not for libraries."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def mend(model: PreTrainedModel) -> PreTrainedModel:
    """Work round the stock classes' faults, in place; idempotent."""
    low, high = getattr(model.config, "time_step_limit", None) or (0.0, float("inf"))
    for module in model.modules():
        if isinstance(module, NemotronHMamba2Mixer):
            module.time_step_limit = (low, high)
    implementation = getattr(model.config, "_experts_implementation", None)
    experts = [tensor for name, tensor in model.named_parameters() if ".experts." in name]
    rows_fit = all(t.shape[-1] * t.element_size() % 16 == 0 for t in experts)
    if implementation == "batched_mm" or (implementation == "grouped_mm" and not rows_fit):
        model.set_experts_implementation("eager")
    return model


def pads_exactly(model: PreTrainedModel) -> bool:
    """May prompts of unlike length share a batch without changing one another's result?"""
    return not getattr(model.config, "use_bias", False)


def use_chunk_scan(model: PreTrainedModel) -> PreTrainedModel:
    """Let the Mamba mixers of this one model run `scan.chunk_scan`, on CPU; others are untouched.

    Results agree with the stock scan to rounding (about 1e-6 in fp32), not bit for bit.
    """
    for module in model.modules():
        if type(module) is NemotronHMamba2Mixer and module.dt_bias.device.type in ("cpu", "meta"):
            module.__class__ = _chunked_mixer()
    return model


def child_config(config: Any, fields: Mapping[str, int]) -> Any:
    """The config with some fields replaced, checked by the stock class.

    Raises:
        ValueError: the stock class cannot express this size.
    """
    values = config.to_dict()
    values.pop("elastic_config", None)
    values["head_dim"] = head_dim(config)  # else a stock class derives it from the smaller widths
    alias = getattr(type(config), "attribute_map", {})
    try:
        child = type(config).from_dict(
            {**values, **{alias.get(f, f): v for f, v in fields.items()}}
        )
    except Exception as error:  # strict configs raise their own kinds
        reason = str(error).strip().splitlines()[-1]
        kind = type(config).__name__
        raise ValueError(f"{kind} cannot express {dict(fields)}: {reason}") from None
    child._attn_implementation = config._attn_implementation
    child._experts_implementation = config._experts_implementation
    return child


def config_json(config: Any) -> dict[str, Any]:
    """`config.json` that stock classes, old readers and other engines read alike."""
    values = config.to_dict()
    values.pop("_name_or_path", None)
    values.pop("auto_map", None)  # remote code does not travel, and is never run
    values["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    for published, inner in type(config).attribute_map.items():
        if inner in values and isinstance(values[inner], int):  # to_dict knows the inner name only
            values[published] = values[inner]
    if config.model_type == "nemotron_h":
        values["hybrid_override_pattern"] = config.hybrid_override_pattern
        values["num_hidden_layers"] = config.num_hidden_layers
        low, high = config.time_step_limit
        # Read by the stock mixer as the lower clamp of dt; otherwise only used to draw an initial
        # dt_bias. 0 would break that draw (log 0), and no softplus in fp32 falls below 1e-30.
        values["time_step_min"] = max(low, _SMALLEST_STEP)
        values.pop("time_step_limit")
        if (low, high) != (0.0, float("inf")):  # the default; infinity has no spelling in JSON
            values["time_step_limit"] = [low, min(high, _LARGEST_STEP)]
    return values


def get_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a model by name, as they are (not detached)."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def set_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Point the parameters and buffers of a model at these very tensors: nothing is copied."""
    for name, tensor in tensors.items():
        owner_name, _, leaf = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        if leaf in owner._buffers:
            owner._buffers[leaf] = tensor
        else:
            owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)


def share_constants(model: nn.Module, source: nn.Module) -> None:
    """Take over buffers that no checkpoint holds (rotary frequencies); no axis changes them."""
    kept = set(source.state_dict())
    for name, buffer in source.named_buffers():
        if name not in kept:
            owner_name, _, leaf = name.rpartition(".")
            owner = model.get_submodule(owner_name)
            owner._buffers[leaf] = buffer
            if hasattr(owner, f"original_{leaf}"):
                setattr(owner, f"original_{leaf}", buffer)


def _chunked_mixer() -> type[NemotronHMamba2Mixer]:
    """The stock mixer whose `forward` finds our scan under the stock scan's name.

    The stock code object runs unchanged in a namespace of its own, so no module is patched and two
    models in one process may differ.
    """
    stock = inspect.unwrap(NemotronHMamba2Mixer.forward)
    namespace = {**stock.__globals__, "mamba2_chunk_scan": chunk_scan}
    forward = types.FunctionType(
        stock.__code__, namespace, stock.__name__, stock.__defaults__, stock.__closure__
    )
    return type("NemotronHMamba2Mixer", (NemotronHMamba2Mixer,), {"forward": forward})
