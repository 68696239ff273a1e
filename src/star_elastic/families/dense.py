"""Decoders with rotary attention and a gated MLP: llama, qwen2, qwen3, qwen3_moe.

The four share their block; they differ in biases, query/key norms and experts only.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from star_elastic.families.family import Family, Probe

_QUERY = "num_key_value_heads*queries*head_dim"
_KEY = "num_key_value_heads*head_dim"


def _decoder(config: Any) -> list[tuple[str, ...]]:
    return [("block", "mlp")] * config.num_hidden_layers


def _decoder_moe(config: Any) -> list[tuple[str, ...]]:
    """Qwen3MoeDecoderLayer: experts every `decoder_sparse_step` layers but `mlp_only_layers`."""
    return [
        ("block", "moe")
        if layer not in (config.mlp_only_layers or [])
        and config.num_experts > 0
        and (layer + 1) % config.decoder_sparse_step == 0
        else ("block", "mlp")
        for layer in range(config.num_hidden_layers)
    ]


def _depth(config: Any, kept: Sequence[int]) -> dict[str, Any]:
    fields: dict[str, Any] = {"num_hidden_layers": len(kept)}
    if getattr(config, "layer_types", None):
        fields["layer_types"] = [config.layer_types[layer] for layer in kept]
    return fields


def _depth_moe(config: Any, kept: Sequence[int]) -> dict[str, Any]:
    """Which layers have experts is listed one by one: a stride would count the wrong layers."""
    parts = _decoder_moe(config)
    dense = [n for n, layer in enumerate(kept) if "moe" not in parts[layer]]
    return {**_depth(config, kept), "mlp_only_layers": dense, "decoder_sparse_step": 1}


_BLOCK = {
    "input_layernorm.weight": "hidden_size",
    "post_attention_layernorm.weight": "hidden_size",
    "self_attn.q_proj.weight": f"{_QUERY}, hidden_size",
    "self_attn.k_proj.weight": f"{_KEY}, hidden_size",
    "self_attn.v_proj.weight": f"{_KEY}, hidden_size",
    "self_attn.o_proj.weight": f"hidden_size, {_QUERY}",
}
_BIAS = {
    "self_attn.q_proj.bias": f"{_QUERY} if attention_bias",
    "self_attn.k_proj.bias": f"{_KEY} if attention_bias",
    "self_attn.v_proj.bias": f"{_KEY} if attention_bias",
    "self_attn.o_proj.bias": "hidden_size if attention_bias",
}
_QWEN2_BIAS = {
    "self_attn.q_proj.bias": _QUERY,
    "self_attn.k_proj.bias": _KEY,
    "self_attn.v_proj.bias": _KEY,
}
_QK_NORM = {
    "self_attn.q_norm.weight": "head_dim",
    "self_attn.k_norm.weight": "head_dim",
}
_MLP = {
    "mlp.gate_proj.weight": "intermediate_size, hidden_size",
    "mlp.up_proj.weight": "intermediate_size, hidden_size",
    "mlp.down_proj.weight": "hidden_size, intermediate_size",
}
_MLP_BIAS = {
    "mlp.gate_proj.bias": "intermediate_size if mlp_bias",
    "mlp.up_proj.bias": "intermediate_size if mlp_bias",
    "mlp.down_proj.bias": "hidden_size if mlp_bias",
}

LLAMA = Family(
    model_type="llama",
    blocks=_decoder,
    depth=_depth,
    axes=("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers"),
    split=("intermediate_size", "num_attention_heads"),
    norms=frozenset(
        {"model.norm.weight", "input_layernorm.weight", "post_attention_layernorm.weight"}
    ),
    masked={
        "model.embed_tokens.weight": (1,),
        "self_attn.o_proj.weight": (0, 1),
        "self_attn.o_proj.bias": (0,),
        "mlp.down_proj.weight": (0, 1),
        "mlp.down_proj.bias": (0,),
    },
    derived={"queries": "num_attention_heads / num_key_value_heads"},
    outside={
        "model.embed_tokens.weight": "vocab_size, hidden_size",
        "model.norm.weight": "hidden_size",
        "lm_head.weight": "vocab_size, hidden_size",
    },
    parts={"block": _BLOCK | _BIAS, "mlp": _MLP | _MLP_BIAS},
    tied={"lm_head.weight": "model.embed_tokens.weight"},
    probes={
        "outside": (Probe("model.norm", "output", ("hidden_size",)),),
        "block": (
            Probe("input_layernorm", "output", ("hidden_size",)),
            Probe("post_attention_layernorm", "output", ("hidden_size",)),
            Probe("self_attn.o_proj", "input", ("num_attention_heads",)),
        ),
        "mlp": (Probe("mlp.down_proj", "input", ("intermediate_size",)),),
    },
    cache={"block": {"token.key": _KEY, "token.value": _KEY}},
)

QWEN2 = replace(LLAMA, model_type="qwen2", parts={"block": _BLOCK | _QWEN2_BIAS, "mlp": _MLP})

QWEN3 = replace(LLAMA, model_type="qwen3", parts={"block": _BLOCK | _BIAS | _QK_NORM, "mlp": _MLP})

QWEN3_MOE = replace(
    QWEN3,
    model_type="qwen3_moe",
    blocks=_decoder_moe,
    depth=_depth_moe,
    experts="num_experts",
    axes=(*LLAMA.axes, "moe_intermediate_size", "num_experts", "num_experts_per_tok"),
    split=(*LLAMA.split, "moe_intermediate_size"),
    parts={
        **QWEN3.parts,
        "moe": {
            "mlp.gate.weight": "num_experts, hidden_size",
            "mlp.experts.{num_experts}.gate_proj.weight": "moe_intermediate_size, hidden_size",
            "mlp.experts.{num_experts}.up_proj.weight": "moe_intermediate_size, hidden_size",
            "mlp.experts.{num_experts}.down_proj.weight": "hidden_size, moe_intermediate_size",
        },
    },
    masked={**LLAMA.masked, "mlp.experts.{num_experts}.down_proj.weight": (0, 1)},
    fused={
        "mlp.experts.gate_up_proj": (
            "mlp.experts.{num_experts}.gate_proj.weight",
            "mlp.experts.{num_experts}.up_proj.weight",
        ),
        "mlp.experts.down_proj": ("mlp.experts.{num_experts}.down_proj.weight",),
    },
    probes={
        **LLAMA.probes,
        "moe": (Probe("mlp.experts", "experts", ("num_experts", "moe_intermediate_size")),),
    },
)
