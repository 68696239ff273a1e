"""Stock transformers classes, with their known faults worked round in this one place.

- Mixers of Nemotron-H clamp dt at the config's *initialisation* minimum when they prefill, and not
  at all when they decode (transformers <= 5.23). `mend` sets the config's own `time_step_limit`.
- Their scan without the fused kernel is a slow reference. `use_chunk_scan` gives a model ours.
- `batched_mm` experts copy every selected expert's weights per token: 40 x slower on a CPU;
  `grouped_mm` ones crash on rows that are no multiple of 16 bytes. Both give way to `eager`.
- Mamba mixers zero padding before `in_proj`: with a bias there, left padding leaks into the first
  real tokens. `pads_exactly` tells which models may be batched with padding.
"""

import importlib.util
import inspect
import types
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer
from transformers.utils import logging

from star_elastic.configs import child_config
from star_elastic.conv import causal_conv1d_fn
from star_elastic.layout import Layout
from star_elastic.scan import chunk_scan
from star_elastic.submodel import Fields, per_layer


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
    # states of one process need no process group; torch finds that worth a warning each time
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")


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
    """Let the Mamba mixers of this one model run `scan.chunk_scan`; others are untouched.

    It keeps packed documents apart (`seq_idx`), which the stock scan refuses to do unfused. Where
    the fused kernels are installed, mixers that are not on a CPU keep them. Results agree with the
    stock scan to rounding (about 1e-6 in fp32), not bit for bit.
    """
    fused = all(importlib.util.find_spec(name) for name in ("mamba_ssm", "causal_conv1d"))
    for module in model.modules():
        if type(module) is not NemotronHMamba2Mixer:
            continue
        if not fused or module.dt_bias.device.type in ("cpu", "meta"):
            module.__class__ = _chunked_mixer()
    return model


def build_child(layout: Layout, fields: Fields) -> PreTrainedModel:
    """A stock model of a smaller size on `meta`; where sizes differ per layer, of stock layers."""
    uneven = per_layer(fields)
    even = {field: value for field, value in fields.items() if field not in uneven}
    whole: PreTrainedModel | None = None
    models: dict[tuple[int, ...], PreTrainedModel] = {}
    for position, layer in enumerate(layout.kept_layers(layout.sizes_of(fields))):
        local = {field: value[layer] for field, value in uneven.items()}
        key = tuple(local.values())
        if key not in models:
            models[key] = build(child_config(layout, {**even, **local}), device="meta")
        whole = whole or models[key]
        layers_of(whole)[position] = layers_of(models[key])[position]
    assert whole is not None
    return whole


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """The layers of a stock causal LM."""
    return cast(nn.ModuleList, model.get_submodule("model.layers"))


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


def refuse_meta(model: nn.Module) -> None:
    """Hold that every tensor of a model that was built on `meta` has come.

    Raises:
        ValueError: naming one that has not.
    """
    if missing := [name for name, tensor in get_tensors(model).items() if tensor.is_meta]:
        raise ValueError(f"{min(missing)}: not loaded")


def fill_constants(model: PreTrainedModel) -> None:
    """Compute the rotary frequencies of a model built on `meta`: no checkpoint holds them."""
    for module in model.modules():
        if "inv_freq" in module._buffers:
            fresh = type(module)(model.config)
            module._buffers.update(fresh._buffers)
            module.original_inv_freq = fresh.original_inv_freq


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


def loaded_dtype(model: PreTrainedModel, name: str) -> torch.dtype:
    """The dtype `from_pretrained` gives a tensor: the config's, or fp32 if its class insists."""
    strict = model._keep_in_fp32_modules_strict or ()
    return torch.float32 if any(part in name for part in strict) else model.dtype


def _chunked_mixer() -> type[NemotronHMamba2Mixer]:
    """The stock mixer whose `forward` finds our scan and convolution under the stock names.

    The stock code object runs unchanged in a namespace of its own, so no module is patched and two
    models in one process may differ.
    """
    stock = inspect.unwrap(NemotronHMamba2Mixer.forward)
    namespace = {
        **stock.__globals__,
        "mamba2_chunk_scan": chunk_scan,
        "causal_conv1d_fn": causal_conv1d_fn,
        "mamba2_split_conv1d_scan_combined": lambda *_, **__: None,  # "there is no fused kernel"
    }
    forward = types.FunctionType(
        stock.__code__, namespace, stock.__name__, stock.__defaults__, stock.__closure__
    )
    return type("NemotronHMamba2Mixer", (NemotronHMamba2Mixer,), {"forward": forward})
