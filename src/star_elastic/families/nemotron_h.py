"""Nemotron-H: Mamba-2, attention without positions, dense relu^2 MLP, (latent) mixture of experts.

Shapes as in transformers' `NemotronHForCausalLM`; `g*m*p` are Mamba groups, heads of a group and
head channels (Mamba-2, arXiv 2405.21060), so that heads are cut within each group.
"""

from collections.abc import Sequence
from typing import Any

from star_elastic.families.family import Family, Probe


def _blocks(config: Any) -> list[tuple[str, ...]]:
    return [("norm", kind) for kind in config.layers_block_type]


def _depth(config: Any, kept: Sequence[int]) -> dict[str, Any]:
    return {"layers_block_type": [config.layers_block_type[layer] for layer in kept]}


_INNER = "n_groups*mamba_heads*mamba_head_dim"
_STATE = "n_groups*ssm_state_size"
_CONV = f"{_INNER} + {_STATE} + {_STATE}"  # x B C
_IN = f"{_INNER} + {_CONV} + n_groups*mamba_heads"  # z x B C dt
_QUERY = "num_key_value_heads*queries*head_dim"
_KEY = "num_key_value_heads*head_dim"

NEMOTRON_H = Family(
    model_type="nemotron_h",
    blocks=_blocks,
    depth=_depth,
    norms=frozenset({"model.norm_f.weight", "norm.weight", "mixer.norm.weight"}),
    disk_prefix=("model.", "backbone."),
    ignored=("mtp.",),
    experts="n_routed_experts",
    masked={
        "model.embeddings.weight": (1,),
        # x alone: what its convolution lets through is all that a head adds, and the gated norm
        # behind it must not see a dropped head
        "mixer.conv1d.weight": (0,),
        "mixer.conv1d.bias": (0,),
        "mixer.out_proj.weight": (0,),
        "mixer.out_proj.bias": (0,),
        "mixer.o_proj.weight": (0, 1),
        "mixer.down_proj.weight": (0, 1),
        "mixer.down_proj.bias": (0,),
        "mixer.experts.{n_routed_experts}.down_proj.weight": (0, 1),
        "mixer.shared_experts.down_proj.weight": (0, 1),
        "mixer.shared_experts.down_proj.bias": (0,),
        "mixer.fc1_latent_proj.weight": (0,),
        "mixer.fc1_latent_proj.bias": (0,),
        "mixer.fc2_latent_proj.weight": (0,),
        "mixer.fc2_latent_proj.bias": (0,),
    },
    axes=(
        "hidden_size",
        "intermediate_size",
        "moe_intermediate_size",
        "moe_shared_expert_intermediate_size",
        "moe_latent_size",
        "n_routed_experts",
        "num_experts_per_tok",
        "num_attention_heads",
        "mamba_num_heads",
        "mamba_head_dim",
        "num_hidden_layers",
    ),
    split=(
        "intermediate_size",
        "moe_intermediate_size",
        "moe_shared_expert_intermediate_size",
        "num_attention_heads",
        "mamba_num_heads",
    ),
    derived={
        "mamba_heads": "mamba_num_heads / n_groups",
        "queries": "num_attention_heads / num_key_value_heads",
        "expert_input": "moe_latent_size or hidden_size",
    },
    outside={
        "model.embeddings.weight": "vocab_size, hidden_size",
        "model.norm_f.weight": "hidden_size",
        "lm_head.weight": "vocab_size, hidden_size",
    },
    parts={
        "norm": {"norm.weight": "hidden_size"},
        "linear_attention": {
            "mixer.in_proj.weight": f"{_IN}, hidden_size",
            "mixer.in_proj.bias": f"{_IN} if use_bias",
            "mixer.conv1d.weight": f"{_CONV}, 1, conv_kernel",
            "mixer.conv1d.bias": f"{_CONV} if use_conv_bias",
            "mixer.dt_bias": "n_groups*mamba_heads",
            "mixer.A_log": "n_groups*mamba_heads",
            "mixer.D": "n_groups*mamba_heads",
            "mixer.norm.weight": _INNER,
            "mixer.out_proj.weight": f"hidden_size, {_INNER}",
            "mixer.out_proj.bias": "hidden_size if use_bias",
        },
        "full_attention": {
            "mixer.q_proj.weight": f"{_QUERY}, hidden_size",
            "mixer.k_proj.weight": f"{_KEY}, hidden_size",
            "mixer.v_proj.weight": f"{_KEY}, hidden_size",
            "mixer.o_proj.weight": f"hidden_size, {_QUERY}",
        },
        "mlp": {
            "mixer.up_proj.weight": "intermediate_size, hidden_size",
            "mixer.up_proj.bias": "intermediate_size if mlp_bias",
            "mixer.down_proj.weight": "hidden_size, intermediate_size",
            "mixer.down_proj.bias": "hidden_size if mlp_bias",
        },
        "moe": {
            "mixer.gate.weight": "n_routed_experts, hidden_size",
            "mixer.gate.e_score_correction_bias": "n_routed_experts",
            "mixer.experts.{n_routed_experts}.up_proj.weight": (
                "moe_intermediate_size, expert_input"
            ),
            "mixer.experts.{n_routed_experts}.down_proj.weight": (
                "expert_input, moe_intermediate_size"
            ),
            "mixer.shared_experts.up_proj.weight": (
                "moe_shared_expert_intermediate_size, hidden_size"
            ),
            "mixer.shared_experts.up_proj.bias": "moe_shared_expert_intermediate_size if mlp_bias",
            "mixer.shared_experts.down_proj.weight": (
                "hidden_size, moe_shared_expert_intermediate_size"
            ),
            "mixer.shared_experts.down_proj.bias": "hidden_size if mlp_bias",
            "mixer.fc1_latent_proj.weight": "moe_latent_size, hidden_size if moe_latent_size",
            "mixer.fc1_latent_proj.bias": "moe_latent_size if moe_latent_size and mlp_bias",
            "mixer.fc2_latent_proj.weight": "hidden_size, moe_latent_size if moe_latent_size",
            "mixer.fc2_latent_proj.bias": "hidden_size if moe_latent_size and mlp_bias",
        },
    },
    fused={
        "mixer.experts.up_proj": ("mixer.experts.{n_routed_experts}.up_proj.weight",),
        "mixer.experts.down_proj": ("mixer.experts.{n_routed_experts}.down_proj.weight",),
    },
    buffers=frozenset({"mixer.gate.e_score_correction_bias"}),
    probes={
        "outside": (Probe("model.norm_f", "output", ("hidden_size",)),),
        "norm": (Probe("norm", "output", ("hidden_size",)),),
        "linear_attention": (
            Probe("mixer.in_proj", "output", ("mamba_num_heads", "mamba_head_dim"), segment=1),
        ),
        "full_attention": (Probe("mixer.o_proj", "input", ("num_attention_heads",)),),
        "mlp": (Probe("mixer.down_proj", "input", ("intermediate_size",)),),
        "moe": (
            Probe("mixer.experts", "experts", ("n_routed_experts", "moe_intermediate_size")),
            Probe(
                "mixer.shared_experts.down_proj",
                "input",
                ("moe_shared_expert_intermediate_size",),
            ),
            Probe("mixer.fc1_latent_proj", "output", ("moe_latent_size",)),
        ),
    },
    cache={
        "full_attention": {"token.key": _KEY, "token.value": _KEY},
        "linear_attention": {
            "conv": f"{_CONV}, conv_kernel",
            "ssm": "n_groups*mamba_heads, mamba_head_dim, ssm_state_size",
        },
    },
)
