"""Which architecture of llama.cpp computes what a stock class computes, and its hyperparameters.

What llama.cpp would read without complaint and compute otherwise is refused here, by field. Read in
llama.cpp's `src/models/*.cpp`, as bundled with llama-cpp-python 0.3.36.
"""

from collections.abc import Iterator
from typing import Any

from gguf import MODEL_ARCH, MODEL_TENSOR, GGUFWriter

from star_elastic.symbols import head_dim

_PER_MODEL = {
    "nemotron_h": MODEL_ARCH.NEMOTRON_H,
    "llama": MODEL_ARCH.LLAMA,
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3,
    "qwen3_moe": MODEL_ARCH.QWEN3MOE,
}
_QKV = {MODEL_TENSOR.ATTN_Q, MODEL_TENSOR.ATTN_K, MODEL_TENSOR.ATTN_V}
_MAMBA = {MODEL_TENSOR.SSM_CONV1D, MODEL_TENSOR.SSM_DT}
_DENSE = {MODEL_TENSOR.FFN_UP, MODEL_TENSOR.FFN_DOWN}
# the biases that each loader reads; a file with any other does not load
BIASES: dict[MODEL_ARCH, set[MODEL_TENSOR]] = {
    MODEL_ARCH.NEMOTRON_H: _MAMBA | _DENSE,
    MODEL_ARCH.NEMOTRON_H_MOE: _MAMBA | {MODEL_TENSOR.FFN_EXP_PROBS_B},
    MODEL_ARCH.LLAMA: _QKV | _DENSE | {MODEL_TENSOR.FFN_GATE, MODEL_TENSOR.ATTN_OUT},
    MODEL_ARCH.QWEN2: _QKV,
    MODEL_ARCH.QWEN3: _QKV,
    MODEL_ARCH.QWEN3MOE: _QKV,
}


def architecture_of(config: Any) -> MODEL_ARCH:
    """The architecture that computes what this stock config says.

    Raises:
        ValueError: llama.cpp has none; names the field and its value.
    """
    for field, value, allowed in _demands(config):
        if value not in allowed:
            one = " or ".join(map(str, allowed))
            raise ValueError(f"config.json: {field} = {value}: llama.cpp has {one} only")
    if config.model_type == "nemotron_h":
        kinds = set(config.layers_block_type)
        if {"mlp", "moe"} <= kinds:
            raise ValueError(
                "config.json: layers_block_type has mlp ('-') and moe ('E') layers: llama.cpp "
                "counts experts once for all feed-forward layers and cannot express both"
            )
        return MODEL_ARCH.NEMOTRON_H_MOE if "moe" in kinds else MODEL_ARCH.NEMOTRON_H
    if config.model_type == "qwen2" and _attention_width(config) != config.hidden_size:
        # That loader wants heads as wide as the model, which submodels are not. A llama with
        # biases on query, key and value is the same function.
        return MODEL_ARCH.LLAMA
    return _PER_MODEL[config.model_type]


def hyperparameters(writer: GGUFWriter, arch: MODEL_ARCH, config: Any) -> None:
    """Write what llama.cpp has to know beside the tensors."""
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    if config.model_type == "nemotron_h":
        _hybrid(writer, arch, config)
    else:
        _decoder(writer, config)


def _demands(config: Any) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """Fields that llama.cpp takes for granted: (field, value, what it may be)."""
    if config.model_type == "nemotron_h":
        yield "mlp_hidden_act", config.mlp_hidden_act, ("relu2",)
        yield "mamba_hidden_act", config.mamba_hidden_act, ("silu",)
        yield "time_step_limit", tuple(config.time_step_limit), ((0.0, float("inf")),)
        return
    yield "hidden_act", config.hidden_act, ("silu",)
    kinds = {*(getattr(config, "layer_types", None) or [])}
    yield "layer_types", min(kinds - {"full_attention"}, default=None), (None,)
    rope = config.rope_parameters["rope_type"]
    # factors of each frequency are read for llama only
    also = ("llama3",) if config.model_type == "llama" else ()
    yield "rope_parameters.rope_type", rope, ("default", "linear", *also)
    if config.model_type == "qwen3_moe":
        yield "norm_topk_prob", config.norm_topk_prob, (True,)
        yield "mlp_only_layers", [*(config.mlp_only_layers or [])], ([],)
        yield "decoder_sparse_step", config.decoder_sparse_step, (1,)


def _attention_width(config: Any) -> int:
    return config.num_attention_heads * head_dim(config)


def _decoder(writer: GGUFWriter, config: Any) -> None:
    rope = config.rope_parameters
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim(config))
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        from gguf import RopeScalingType

        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if config.model_type == "qwen3_moe":
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)


def _hybrid(writer: GGUFWriter, arch: MODEL_ARCH, config: Any) -> None:
    """Kinds of layers are told by zeros: no KV heads and no feed-forward width make a mixer."""
    kinds = config.layers_block_type
    is_moe = arch == MODEL_ARCH.NEMOTRON_H_MOE
    width = config.moe_intermediate_size if is_moe else config.intermediate_size
    heads = config.num_key_value_heads
    writer.add_feed_forward_length([width if kind in ("mlp", "moe") else 0 for kind in kinds])
    writer.add_head_count_kv([heads if kind == "full_attention" else 0 for kind in kinds])
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_layer_norm_rms_eps(config.layer_norm_epsilon)
    writer.add_ssm_conv_kernel(config.conv_kernel)
    writer.add_ssm_inner_size(config.mamba_num_heads * config.mamba_head_dim)
    writer.add_ssm_state_size(config.ssm_state_size)
    writer.add_ssm_time_step_rank(config.mamba_num_heads)
    writer.add_ssm_group_count(config.n_groups)
    if is_moe:
        _experts(writer, config)


def _experts(writer: GGUFWriter, config: Any) -> None:
    writer.add_expert_count(config.n_routed_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_shared_feed_forward_length(config.moe_shared_expert_intermediate_size)
    writer.add_expert_weights_norm(config.norm_topk_prob)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    if config.n_group > 1:  # one group is none, and llama.cpp wants fewer groups than experts
        writer.add_expert_group_count(config.n_group)
        writer.add_expert_group_used_count(config.topk_group)
    if config.moe_latent_size is not None:
        writer.add_moe_latent_size(config.moe_latent_size)
