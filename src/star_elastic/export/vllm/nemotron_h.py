"""Nemotron-H on a CPU, where vLLM has no kernel for experts without a gate.

vLLM's model, but for the layers with experts: each expert is an MLP of vLLM's own (sharded over
ranks, quantized or not, as any other of its linear layers), and each runs on the tokens that chose
it. Slow beside a fused kernel, and exact; on GPUs vLLM's class stays in its place.

Shapes: T tokens, D hidden_size, E experts, K experts of a token.
"""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config  # pyright: ignore[reportMissingImports]
from vllm.distributed import (  # pyright: ignore[reportMissingImports]
    tensor_model_parallel_all_reduce,
)
from vllm.forward_context import get_forward_context  # pyright: ignore[reportMissingImports]
from vllm.model_executor.layers.layernorm import RMSNorm  # pyright: ignore[reportMissingImports]
from vllm.model_executor.layers.linear import (  # pyright: ignore[reportMissingImports]
    ReplicatedLinear,
)
from vllm.model_executor.models import nemotron_h as stock  # pyright: ignore[reportMissingImports]
from vllm.utils.torch_utils import (  # pyright: ignore[reportMissingImports]
    direct_register_custom_op,
)

_OP = "elastic_plain_moe"


class PlainMoE(nn.Module):
    """A mixture of experts without kernels; its parameters have the names of the checkpoint."""

    def __init__(self, config: Any, quant_config: Any, prefix: str):
        super().__init__()
        self.config, self.prefix = config, prefix
        get_current_vllm_config().compilation_config.static_forward_context[prefix] = self
        self.gate = ReplicatedLinear(
            config.hidden_size,
            config.n_routed_experts,
            bias=False,
            params_dtype=torch.float32,
            prefix=f"{prefix}.gate",
        )
        bias = torch.empty(config.n_routed_experts, dtype=torch.float32)
        self.gate.e_score_correction_bias = nn.Parameter(bias, requires_grad=False)
        latent = getattr(config, "moe_latent_size", None)
        self.fc1_latent_proj = self.fc2_latent_proj = None
        if latent:
            self.fc1_latent_proj = ReplicatedLinear(
                config.hidden_size,
                latent,
                bias=config.mlp_bias,
                quant_config=quant_config,
                prefix=f"{prefix}.fc1_latent_proj",
            )
            self.fc2_latent_proj = ReplicatedLinear(
                latent,
                config.hidden_size,
                bias=config.mlp_bias,
                quant_config=quant_config,
                prefix=f"{prefix}.fc2_latent_proj",
            )
        width = latent or config.hidden_size
        self.experts = nn.ModuleList(
            stock.NemotronHMLP(
                None,
                width,
                config.moe_intermediate_size,
                quant_config,
                reduce_results=False,  # `mix` does, once for all of them
                prefix=f"{prefix}.experts.{n}",
            )
            for n in range(config.n_routed_experts)
        )
        self.shared_experts = stock.NemotronHMLP(
            None,
            config.hidden_size,
            config.moe_shared_expert_intermediate_size,
            quant_config,
            bias=config.mlp_bias,
            prefix=f"{prefix}.shared_experts",
        )
        # what vLLM's model asks of any mixture of experts: nothing is balanced over ranks here
        self.n_routed_experts = self.n_logical_experts = config.n_routed_experts
        self.n_physical_experts = self.n_local_physical_experts = config.n_routed_experts
        self.n_shared_experts, self.n_redundant_experts = 1, 0

    def forward(self, x_TD: Tensor) -> Tensor:
        """`mix` as one opaque step: which experts run is not known when a graph is compiled."""
        return getattr(torch.ops.vllm, _OP)(x_TD, self.prefix)

    def mix(self, x_TD: Tensor) -> Tensor:
        """The weighted sum of each token's experts, and the shared one."""
        weights_TK, experts_TK = self.route(x_TD)
        inner = x_TD if self.fc1_latent_proj is None else self.fc1_latent_proj(x_TD)[0]
        routed = torch.zeros_like(inner)
        for expert in experts_TK.unique().tolist():
            token, place = (experts_TK == expert).nonzero(as_tuple=True)
            found = self.experts[expert](inner[token]) * weights_TK[token, place, None]
            routed.index_add_(0, token, found.to(routed.dtype))
        routed = tensor_model_parallel_all_reduce(routed)  # experts are cut over ranks
        if self.fc2_latent_proj is not None:
            routed = self.fc2_latent_proj(routed)[0]
        return routed + self.shared_experts(x_TD)

    def route(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """The weights and the numbers of each token's experts (T, K).

        Experts are chosen with the correction bias, inside the best groups; weighted without it.
        """
        config = self.config
        scores_TE = self.gate(x_TD.float())[0].sigmoid()
        biased_TE = scores_TE + self.gate.e_score_correction_bias
        if config.n_group > 1:
            grouped = biased_TE.unflatten(-1, (config.n_group, -1))
            best = grouped.topk(2, dim=-1).values.sum(-1).topk(config.topk_group, dim=-1).indices
            kept = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter_(1, best, True)
            biased_TE = grouped.masked_fill(~kept[..., None], float("-inf")).flatten(1)
        experts_TK = biased_TE.topk(config.num_experts_per_tok, dim=-1).indices
        weights_TK = scores_TE.gather(1, experts_TK)
        if config.norm_topk_prob:
            weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
        return weights_TK * config.routed_scaling_factor, experts_TK


class PlainMoEDecoderLayer(stock.NemotronHMoEDecoderLayer):
    """vLLM's layer with experts, around `PlainMoE`."""

    def __init__(
        self, config: Any, layer_idx: int, quant_config: Any = None, prefix: str = "", **_: Any
    ) -> None:
        nn.Module.__init__(self)  # vLLM's own would build the experts it has no kernel for
        self.config = config
        self.mixer = PlainMoE(config, quant_config, f"{prefix}.mixer")
        self.norm = RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)


class NemotronHForCausalLM(stock.NemotronHForCausalLM):
    """vLLM's model, its layers with experts ours; registered on CPUs only."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        stock.ALL_DECODER_LAYER_TYPES["E"] = PlainMoEDecoderLayer
        if not hasattr(torch.ops.vllm, _OP):
            direct_register_custom_op(_OP, _mix, fake_impl=_mix_shape)
        super().__init__(vllm_config=vllm_config, prefix=prefix)


def _mix(x: Tensor, prefix: str) -> Tensor:
    return get_forward_context().no_compile_layers[prefix].mix(x)


def _mix_shape(x: Tensor, prefix: str) -> Tensor:
    return torch.empty_like(x)
