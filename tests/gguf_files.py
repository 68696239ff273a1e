"""Tiny checkpoints exported as GGUF, files read back, and what they should hold, by hand."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from byte_level import TOKENS, tokenizer
from gguf import GGUFReader
from gguf.quants import dequantize
from models import CONFIGS, ORDER, SMALL, tiny
from safetensors.torch import load_file

from star_elastic.checkpoint import Checkpoint
from star_elastic.export.gguf import Written, make_plan, type_of, write_gguf
from star_elastic.model import ElasticModel
from star_elastic.submodel import ElasticSpace

MODELS: dict[str, tuple[str, dict[str, Any]]] = {  # what llama.cpp can express
    "moe": ("nemotron_h", dict(hybrid_override_pattern="MEM*EE")),
    "latent": (
        "nemotron_h-latent",
        dict(hybrid_override_pattern="MEM*E", mlp_bias=False, use_bias=False),
    ),
    "dense": ("nemotron_h", dict(hybrid_override_pattern="M-M*-M", mlp_bias=True)),
    "llama": ("llama", {}),
    "llama-tied": ("llama-tied", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", dict(attention_bias=False)),
    "qwen3_moe": ("qwen3_moe", dict(mlp_only_layers=[])),
}
ARCH = {"moe": "nemotron_h_moe", "latent": "nemotron_h_moe", "dense": "nemotron_h"}
ARCH |= {"llama-tied": "llama", "qwen3_moe": "qwen3moe"}
# suffix on disk -> name in the file, as llama.cpp's loaders ask for them; written by hand
_HYBRID = {
    "norm": "attn_norm",
    "mixer.in_proj": "ssm_in",
    "mixer.conv1d": "ssm_conv1d",
    "mixer.norm": "ssm_norm",
    "mixer.out_proj": "ssm_out",
    "mixer.q_proj": "attn_q",
    "mixer.k_proj": "attn_k",
    "mixer.v_proj": "attn_v",
    "mixer.o_proj": "attn_output",
    "mixer.up_proj": "ffn_up",
    "mixer.down_proj": "ffn_down",
    "mixer.gate": "ffn_gate_inp",
    "mixer.experts.up_proj": "ffn_up_exps",
    "mixer.experts.down_proj": "ffn_down_exps",
    "mixer.shared_experts.up_proj": "ffn_up_shexp",
    "mixer.shared_experts.down_proj": "ffn_down_shexp",
    "mixer.fc1_latent_proj": "ffn_latent_down",
    "mixer.fc2_latent_proj": "ffn_latent_up",
}
_DECODER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
}
_ODD = {
    "mixer.A_log": "ssm_a",
    "mixer.D": "ssm_d",
    "mixer.dt_bias": "ssm_dt.bias",
    "mixer.gate.e_score_correction_bias": "exp_probs_b.bias",
}
_OUTSIDE = {"embeddings": "token_embd", "embed_tokens": "token_embd", "lm_head": "output"}
_OUTSIDE |= {"norm_f": "output_norm", "norm": "output_norm"}


def checkpoint(folder: Path, name: str = "moe", **changes: Any) -> Checkpoint:
    """Three sizes of a tiny parent and a tokenizer, opened."""
    family, own = MODELS[name]
    stock = tiny(family, **{"vocab_size": TOKENS + 8} | own | changes)
    model = ElasticModel(stock, layer_order=ORDER[family])
    axes = model.layout.axes
    small = {field: value for field, value in SMALL[family].items() if field in axes}
    sizes = {"full": {}, "small": small, "narrow": {"hidden_size": small["hidden_size"]}}
    model.space = ElasticSpace.of(model.layout, sizes, trained=True)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return Checkpoint.open(folder)


def export(
    opened: Checkpoint, out: Path, size: str = "small", kind: str = "f32", **options: Any
) -> Written:
    plan = make_plan(opened, opened.size(size), type_of(kind), **options)
    return write_gguf(plan, out)


def values(path: Path) -> dict[str, np.ndarray]:
    return {t.name: dequantize(t.data, t.tensor_type) for t in GGUFReader(path).tensors}


def fields(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in GGUFReader(path).fields.items()}


def translated(
    folder: Path, tensors: Mapping[str, torch.Tensor] | None = None
) -> dict[str, np.ndarray]:
    """A stock folder's tensors, under the names and in the shapes that llama.cpp wants."""
    config = json.loads((folder / "config.json").read_text())
    tensors = tensors or load_file(folder / "model.safetensors")
    found: dict[str, np.ndarray] = {}
    experts: dict[str, list[tuple[int, np.ndarray]]] = {}
    for name, tensor in tensors.items():
        words, array = name.split("."), tensor.float().numpy()
        if "layers" not in words:
            found[f"{_OUTSIDE[words[-2]]}.weight"] = array
            continue
        layer, inner = words[2], words[3:]
        if "experts" in inner and inner[-1] == "weight":
            number = int(inner.pop(2))
            key = f"blk.{layer}.{(_HYBRID | _DECODER)['.'.join(inner[:-1])]}.weight"
            experts.setdefault(key, []).append((number, array))
            continue
        suffix = ".".join(inner)
        plain = suffix.rpartition(".")[0]
        there = _ODD.get(suffix) or f"{(_HYBRID | _DECODER)[plain]}.{inner[-1]}"
        found[f"blk.{layer}.{there}"] = _reshaped(there, array, config)
    stacks = {
        key: np.stack([a for _, a in sorted(each, key=lambda e: e[0])])
        for key, each in experts.items()
    }
    return found | stacks


def _reshaped(name: str, array: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
    if name == "ssm_a":
        return -np.exp(array).reshape(-1, 1)
    if name == "ssm_d":
        return array.reshape(-1, 1)
    if name == "ssm_conv1d.weight":
        return array[:, 0]
    if name == "ssm_norm.weight":
        return array.reshape(config["n_groups"], -1)
    # heads of the small qwen2 are narrower than the model: it goes as a llama
    is_llama = config["model_type"] == "llama" or (
        config["model_type"] == "qwen2"
        and config["num_attention_heads"] * config["head_dim"] != config["hidden_size"]
    )
    if is_llama and (count := heads.get(name.partition(".")[0])):
        width = config["head_dim"]
        turned = [i + half for i in range(width // 2) for half in (0, width // 2)]
        return array[[head * width + i for head in range(config[count]) for i in turned]]
    return array


def aligned(folder: Path, name: str = "moe") -> Checkpoint:
    """Widths that fill blocks of 32 in the parent, of which `small` breaks one."""
    changes = dict(mamba_head_dim=16, moe_shared_expert_intermediate_size=64)
    changes |= dict(hidden_size=64, moe_intermediate_size=64, intermediate_size=64)
    family = CONFIGS[MODELS[name][0]]
    return checkpoint(folder, name, **{k: v for k, v in changes.items() if k in family})
