"""Tiny stock models of every family, with weights in which nothing is trivial."""

from collections.abc import Mapping
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from star_elastic.layout import Layout
from star_elastic.model import ElasticModel
from star_elastic.submodel import ElasticSpace

VOCAB = 64

_HYBRID = dict(
    model_type="nemotron_h",
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=24,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=8,
    mamba_num_heads=8,
    mamba_head_dim=4,
    n_groups=2,
    ssm_state_size=6,
    conv_kernel=4,
    chunk_size=8,
    n_routed_experts=6,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    moe_shared_expert_intermediate_size=20,
    routed_scaling_factor=2.5,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=None,
    eos_token_id=None,
)
_DECODER = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=None,
    eos_token_id=None,
)
_NO_HEAD_DIM = {key: value for key, value in _DECODER.items() if key != "head_dim"} | dict(
    num_attention_heads=4
)

CONFIGS: dict[str, dict[str, Any]] = {
    "nemotron_h": _HYBRID | dict(hybrid_override_pattern="MEM*-E"),
    "nemotron_h-latent": _HYBRID
    | dict(hybrid_override_pattern="MEM*-", moe_latent_size=16, mlp_bias=True, use_bias=True),
    "llama": _DECODER | dict(model_type="llama", attention_bias=True, mlp_bias=True),
    "llama-tied": _DECODER | dict(model_type="llama", tie_word_embeddings=True),
    "qwen2": _NO_HEAD_DIM | dict(model_type="qwen2", tie_word_embeddings=False),
    "qwen3": _DECODER | dict(model_type="qwen3", attention_bias=True, tie_word_embeddings=False),
    "qwen3_moe": _NO_HEAD_DIM
    | dict(
        model_type="qwen3_moe",
        num_hidden_layers=3,
        mlp_only_layers=[1],
        num_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        norm_topk_prob=True,
        tie_word_embeddings=False,
    ),
}
FAMILIES = list(CONFIGS)

_HYBRID_SMALL = dict(
    hidden_size=24,
    intermediate_size=16,
    moe_intermediate_size=8,  # a multiple of 16 bytes even in bfloat16: grouped_mm wants it
    moe_shared_expert_intermediate_size=12,
    n_routed_experts=4,
    num_attention_heads=4,
    mamba_num_heads=4,
    mamba_head_dim=3,
)
_DECODER_SMALL = dict(
    hidden_size=24, intermediate_size=16, num_attention_heads=4, num_hidden_layers=1
)
_QWEN2_SMALL = _DECODER_SMALL | dict(num_attention_heads=2)
_MOE_SMALL = _QWEN2_SMALL | dict(
    moe_intermediate_size=8, num_experts=4, num_experts_per_tok=1, num_hidden_layers=2
)

ORDER = {  # layers, best first; the last ones go
    "nemotron_h": [3, 1, 2, 5, 4, 0],
    "nemotron_h-latent": [3, 1, 4, 2, 0],
    "qwen3_moe": [2, 1, 0],
} | dict.fromkeys(["llama", "llama-tied", "qwen2", "qwen3"], [1, 0])
SMALL: dict[str, dict[str, int]] = {  # every axis is cut
    "nemotron_h": _HYBRID_SMALL | dict(num_experts_per_tok=1, num_hidden_layers=5),
    "nemotron_h-latent": _HYBRID_SMALL
    | dict(num_experts_per_tok=1, moe_latent_size=8, num_hidden_layers=4),
    "llama": _DECODER_SMALL,
    "llama-tied": _DECODER_SMALL,
    "qwen2": _QWEN2_SMALL,
    "qwen3": _DECODER_SMALL,
    "qwen3_moe": _MOE_SMALL,
}
# Prefixes of every dimension: no cut inside the groups of Mamba or attention heads.
PREFIX = {
    name: {
        field: value
        for field, value in fields.items()
        if field not in ("num_attention_heads", "mamba_num_heads", "mamba_head_dim")
    }
    for name, fields in SMALL.items()
}


def tiny_config(family: str, **changes: Any) -> Any:
    """A fresh config of a family, some fields changed."""
    values = CONFIGS[family] | changes
    return AutoConfig.for_model(**values)


def tiny(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A fresh stock model in eval mode, its weights drawn so that none is trivial."""
    config = tiny_config(family, **changes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    perturb(model, seed)
    return unclamped(model.eval())


@torch.no_grad()
def perturb(model: PreTrainedModel, seed: int) -> None:
    """Draw every weight anew; norms about 1, biases and Mamba's own parameters far from 0."""
    draw = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=draw)
        if name.endswith(("norm.weight", "norm_f.weight", ".D")):
            tensor.copy_(1 + 0.3 * noise)
        elif name.endswith(("bias", "A_log")):
            tensor.copy_(0.5 * noise)
        elif "embed" in name:
            tensor.copy_(noise)
        else:
            tensor.copy_(1.5 * noise * tensor.shape[-1] ** -0.5)


def unclamped(model: PreTrainedModel) -> PreTrainedModel:
    """The stock mixers as they should be: dt limited by the config's `time_step_limit` only."""
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            object.__setattr__(module, "time_step_limit", tuple(model.config.time_step_limit))
    return model


def elastic(family: str, seed: int = 0, **changes: Any) -> ElasticModel:
    """A parent with three sizes: full, small (every axis cut) and prefix (plain prefixes only)."""
    sizes = {"full": {}, "small": SMALL[family], "prefix": PREFIX[family]}
    model = ElasticModel(tiny(family, seed, **changes), layer_order=ORDER[family])
    model.space = ElasticSpace.of(model.layout, sizes, trained=True)
    return model


def kept_layers(family: str, fields: Mapping[str, Any]) -> list[int]:
    """The parent's layers that a smaller model keeps."""
    return sorted(ORDER[family][: fields.get("num_hidden_layers")])


def child_config(family: str, fields: Mapping[str, Any]) -> Any:
    """The stock config of a smaller model, made from nothing of ours; heads keep their width."""
    changes: dict[str, Any] = {**fields, "head_dim": 8}
    if "num_hidden_layers" in changes:
        kept = kept_layers(family, fields)
        if pattern := CONFIGS[family].get("hybrid_override_pattern"):
            del changes["num_hidden_layers"]
            changes["hybrid_override_pattern"] = "".join(pattern[layer] for layer in kept)
        if "mlp_only_layers" in CONFIGS[family]:
            dense = CONFIGS[family]["mlp_only_layers"]
            changes["mlp_only_layers"] = [n for n, layer in enumerate(kept) if layer in dense]
    return tiny_config(family, **changes)


def layout_of(family: str, **changes: Any) -> Layout:
    """The layout of a tiny parent whose layers are ranked."""
    return Layout(tiny_config(family, **changes), ORDER[family])


def standalone(family: str, fields: Mapping[str, int], state: Mapping[str, Tensor]) -> Any:
    """A stock model of a smaller size that owns its tensors."""
    config = child_config(family, fields)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    lacking = model.load_state_dict(dict(state), strict=False)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    assert set(lacking.missing_keys) <= tied and not lacking.unexpected_keys
    return unclamped(model.eval())


def token_ids(rows: int = 2, length: int = 13, seed: int = 0) -> Tensor:
    """Random tokens; length 13 is no multiple of the scan's chunk."""
    return torch.randint(1, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """What a model says, without a cache."""
    return model(input_ids=ids, use_cache=False).logits


PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789 +-*=?.,:()#<>/_"


def letters_tokenizer(chat: bool = False) -> PreTrainedTokenizerFast:
    """One token a character, with padding and an end; `chat` adds a template."""
    words = [PAD, EOS, UNKNOWN, *_LETTERS]
    core = Tokenizer(WordLevel({word: n for n, word in enumerate(words)}, unk_token=UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, eos_token=EOS, unk_token=UNKNOWN
    )
    if chat:
        tokenizer.chat_template = "{% for m in messages %}:{{ m['content'] }}{% endfor %}="
    return tokenizer


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
