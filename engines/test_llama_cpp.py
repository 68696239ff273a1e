"""Exported GGUF files in llama.cpp itself: logits, greedy tokens and tokens of text, as stock has
them. Tiny models are made on the spot; what codes cost is printed (`pytest -s`) as KL divergence.
"""

import random
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from byte_level import KINDS, tokenizer
from models import perturb
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from star_elastic import ElasticModel
from star_elastic.checkpoint import Checkpoint
from star_elastic.submodel import ElasticSpace

llama_cpp = pytest.importorskip("llama_cpp")
pytest.importorskip("gguf")
from star_elastic.export.gguf import make_plan, type_of, write_gguf  # noqa: E402
from star_elastic.precision import format_of  # noqa: E402
from star_elastic.quantize import make_plan as quantization  # noqa: E402
from star_elastic.quantize import quantize_checkpoint  # noqa: E402

DEMO = Path(__file__).parent.parent / "demo" / "parent"
VOCAB, PROMPT, NEW = 384, 40, 20  # more ids than tokens
CLOSE = 2e-4  # of logits whose standard deviation is 1 to 3
TEXTS = [
    "What is 12 + 34?  I don't know.",
    "\n\n  tabs\tand  spaces \n",
    "ünïcode: 東京 😀😀foo — “quoted”",
    "camelCase x=3.14159, 'sand, 'tis",
    "<s>user<turn>hello</turn>",
]
_HYBRID: dict[str, Any] = dict(
    model_type="nemotron_h",
    hidden_size=64,
    intermediate_size=96,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    mamba_num_heads=8,
    mamba_head_dim=16,
    n_groups=2,
    ssm_state_size=16,
    n_routed_experts=6,
    num_experts_per_tok=2,
    moe_intermediate_size=64,
    moe_shared_expert_intermediate_size=96,
    routed_scaling_factor=2.5,
)
_DECODER: dict[str, Any] = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    tie_word_embeddings=False,
)
_QWEN2 = {key: value for key, value in _DECODER.items() if key != "head_dim"}
_MOE = dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=64, norm_topk_prob=True)
CONFIGS: dict[str, dict[str, Any]] = {
    "moe": _HYBRID | dict(hybrid_override_pattern="MEM*E"),
    "moe-latent": _HYBRID | dict(hybrid_override_pattern="ME*E", moe_latent_size=32),
    "moe-groups": _HYBRID | dict(hybrid_override_pattern="ME*", n_group=3, topk_group=2),
    "dense": _HYBRID | dict(hybrid_override_pattern="M-M*-", mlp_bias=True, use_conv_bias=False),
    "llama": _DECODER | dict(model_type="llama", attention_bias=True, mlp_bias=True),
    "llama-tied": _DECODER | dict(model_type="llama", tie_word_embeddings=True),
    "llama3": _DECODER
    | dict(
        model_type="llama",
        max_position_embeddings=256,
        rope_parameters=dict(
            rope_type="llama3",
            rope_theta=1e4,
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    ),
    "qwen2": _QWEN2 | dict(model_type="qwen2"),
    "qwen3": _DECODER | dict(model_type="qwen3"),
    "qwen3-linear": _DECODER
    | dict(
        model_type="qwen3",
        rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=4.0),
    ),
    "qwen3_moe": _DECODER | dict(model_type="qwen3_moe", **_MOE),
}
_CUT = dict(hidden_size=32, num_attention_heads=2)
_CUT_HYBRID = _CUT | dict(mamba_num_heads=4)
_CUT_MOE = dict(n_routed_experts=4, num_experts_per_tok=1, moe_intermediate_size=32)
SMALL: dict[str, dict[str, int]] = {
    "moe": _CUT_HYBRID | _CUT_MOE | dict(moe_shared_expert_intermediate_size=64),
    "moe-latent": _CUT_HYBRID | _CUT_MOE,
    "moe-groups": _CUT_HYBRID | dict(moe_intermediate_size=32),
    "dense": _CUT_HYBRID | dict(intermediate_size=64, num_hidden_layers=4),
    "qwen3_moe": _CUT | dict(num_experts=4, moe_intermediate_size=32, num_hidden_layers=2),
}
for _name in ("llama", "llama-tied", "llama3", "qwen2", "qwen3", "qwen3-linear"):
    SMALL[_name] = _CUT | dict(intermediate_size=64, num_hidden_layers=2)


def stock_model(name: str, **changes: Any) -> PreTrainedModel:
    """A fresh stock model, no weight trivial, dt unclamped."""
    values = dict(vocab_size=VOCAB, max_position_embeddings=128) | CONFIGS[name] | changes
    config = AutoConfig.for_model(**values)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    perturb(model, 0)
    return model.eval()


def elastic(folder: Path, name: str, kind: str = "gpt2", **changes: Any) -> ElasticModel:
    """A parent of three sizes on disk, with a tokenizer beside it."""
    model = stock_model(name, **changes)
    layers = model.config.num_hidden_layers
    order = [*range(1, layers), 0]  # the first layer goes first
    made = ElasticModel(model, layer_order=order)
    small = SMALL[name]
    sizes = {"full": {}, "middle": {"num_attention_heads": 2}, "small": small}
    made.space = ElasticSpace.of(made.layout, sizes, trained=True)
    made.save_pretrained(folder)
    tokenizer(kind).save_pretrained(folder)
    return ElasticModel.from_pretrained(folder)


def exported(folder: Path, out: Path, size: str, kind: str = "f32", **options: bool) -> Path:
    opened = Checkpoint.open(folder)
    plan = make_plan(opened, opened.size(size), type_of(kind), **options)
    return write_gguf(plan, out).path


@contextmanager
def running(path: Path) -> Iterator[Any]:
    """The file in llama.cpp, its KV cache in fp32 as stock's is."""
    options = dict(type_k=0, type_v=0, flash_attn=False, n_threads=1, n_threads_batch=1)
    with closing(
        llama_cpp.Llama(str(path), n_ctx=256, logits_all=True, verbose=False, **options)
    ) as llama:
        yield llama


def scribbles(without: str = "", count: int = 400) -> list[str]:
    """Texts of what pre-tokenizers care about, in no sensible order."""
    draw = random.Random(0)
    bits = ["a", "sand", "The", "HTTP", "é", "Ä", "東", "😀", "'s", "'T", "'", ".", "—", "$", "/"]
    bits += [" ", " ", "  ", "\n", "\t", "1", "234", "²", "\u0301", "is", "an", "re"]
    bits = [bit for bit in bits if bit not in without]
    return ["".join(draw.choices(bits, k=draw.randint(1, 12))) for _ in range(count)]


def prompt() -> list[int]:
    return torch.randint(5, 300, (PROMPT,), generator=torch.Generator().manual_seed(1)).tolist()


def their_logits(path: Path) -> np.ndarray:
    with running(path) as llama:
        llama.eval(prompt())
        return np.array(llama.scores[:PROMPT])


@torch.no_grad()
def our_logits(model: PreTrainedModel) -> np.ndarray:
    return model(torch.tensor([prompt()]), use_cache=False).logits[0].numpy()


def greedy(path: Path) -> list[int]:
    with running(path) as llama:
        generated = llama.generate(prompt(), temp=0.0, repeat_penalty=1.0)
        return [token for token, _ in zip(generated, range(NEW), strict=False)]


def divergence(found: np.ndarray, expected: np.ndarray) -> float:
    """Mean KL of the next-token distributions, in nats."""
    p, q = (torch.tensor(x).double().log_softmax(-1) for x in (expected, found))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("name", CONFIGS)
def test_every_size_says_what_stock_says(name: str, tmp_path: Path) -> None:
    model = elastic(tmp_path / "e", name)
    for size in model.sizes:
        path = exported(tmp_path / "e", tmp_path / f"{size}.gguf", size)
        ours, theirs = our_logits(model[size]), their_logits(path)
        apart = float(np.abs(ours - theirs).max())
        print(f"{name} {size}: max |difference| {apart:.1e}, std {ours.std():.2f}")
        assert apart < CLOSE
        ids = model[size].generate(
            torch.tensor([prompt()]), max_new_tokens=NEW, do_sample=False, eos_token_id=None
        )
        assert greedy(path) == ids[0, PROMPT:].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_text_becomes_the_same_tokens(kind: str, tmp_path: Path) -> None:
    elastic(tmp_path / "e", "llama", kind)
    stock = tokenizer(kind)
    # llama.cpp knows no case and no marks beyond ASCII; `export` says so
    without = "éÄ東\u0301" if kind in ("tekken", "gpt4o") else ""
    with running(exported(tmp_path / "e", tmp_path / "t.gguf", "small")) as llama:
        for text in [*TEXTS, *scribbles(without)]:
            expected = stock(text).input_ids
            assert llama.tokenize(text.encode(), add_bos=True, special=True) == expected
            assert llama.detokenize(expected, special=True).decode() == stock.decode(expected)
        assert llama.metadata["tokenizer.chat_template"] == stock.chat_template
        assert llama.token_eos() == stock.eos_token_id


def test_token_ids_only(tmp_path: Path) -> None:
    model = elastic(tmp_path / "e", "qwen3")
    path = exported(tmp_path / "e", tmp_path / "ids.gguf", "small", with_tokenizer=False)
    assert np.abs(our_logits(model["small"]) - their_logits(path)).max() < CLOSE


def test_the_demonstrations_parent(tmp_path: Path) -> None:
    """A trained model, and a pre-tokenizer that llama.cpp has not, whose tokens it makes alike."""
    stock = PreTrainedTokenizerFast.from_pretrained(DEMO)
    with running(exported(DEMO, tmp_path / "demo.gguf", "full")) as llama:
        for text in [*TEXTS, *scribbles()]:
            expected = stock(text).input_ids
            assert llama.tokenize(text.encode(), add_bos=True, special=True) == expected
    ours = our_logits(ElasticModel.from_pretrained(DEMO)["full"])
    assert np.abs(ours - their_logits(tmp_path / "demo.gguf")).max() < CLOSE


# hidden width 256: K-quants fill blocks; the limits are loose, these are random weights
@pytest.mark.parametrize(
    ("kind", "limit"),
    [
        ("bf16", 1e-3),
        ("f16", 1e-4),
        ("q8_0", 1e-2),
        ("q6_k", 0.1),
        ("q4_k_m", 1.0),
        ("iq4_nl", 1.0),
        ("mxfp4", 1.0),
        ("nvfp4", 1.0),
    ],
)
def test_what_codes_cost(kind: str, limit: float, tmp_path: Path) -> None:
    widths = dict(hidden_size=256, intermediate_size=256, moe_intermediate_size=256)
    widths |= dict(moe_shared_expert_intermediate_size=256, mamba_head_dim=32, head_dim=64)
    model = elastic(tmp_path / "e", "moe", **widths)
    path = exported(tmp_path / "e", tmp_path / "coded.gguf", "full", kind)
    cost = divergence(their_logits(path), our_logits(model["full"]))
    print(f"{kind}: {path.stat().st_size:,} bytes, KL {cost:.1e}")
    assert 0 < cost < limit


def test_nvfp4_beside_biases(tmp_path: Path) -> None:
    """Not in feed-forward layers, where llama.cpp would stop the process."""
    model = elastic(tmp_path / "e", "llama", hidden_size=128, intermediate_size=128)
    path = exported(tmp_path / "e", tmp_path / "n.gguf", "full", "nvfp4")
    assert 0 < divergence(their_logits(path), our_logits(model["full"])) < 1.0


def test_widths_that_fill_no_blocks_on_request(tmp_path: Path) -> None:
    """llama.cpp takes other types then, and the file runs."""
    elastic(tmp_path / "e", "moe")
    path = exported(tmp_path / "e", tmp_path / "f.gguf", "small", "q4_k_m", fallback=True)
    assert np.isfinite(their_logits(path)).all()


@pytest.mark.parametrize("name", ["moe", "llama-tied", "qwen3_moe"])
def test_a_parent_in_codes_keeps_them(name: str, tmp_path: Path) -> None:
    """Quantized once, every size runs on the parent's own codes; llama.cpp rounds activations."""
    widths = dict(hidden_size=128, intermediate_size=128, moe_intermediate_size=128)
    widths |= dict(moe_shared_expert_intermediate_size=128)
    elastic(tmp_path / "e", name, **{k: v for k, v in widths.items() if k in CONFIGS[name]})
    planned = quantization(Checkpoint.open(tmp_path / "e"), format_of("nvfp4"))
    quantize_checkpoint(planned, tmp_path / "q", drop=True)
    model = ElasticModel.from_pretrained(tmp_path / "q")
    with pytest.raises(ValueError, match="32 columns of NVFP4 codes do not fill .* blocks of 64"):
        exported(tmp_path / "q", tmp_path / "small.gguf", "small", "nvfp4")
    for size in ("full", "middle"):
        path = exported(tmp_path / "q", tmp_path / f"{size}.gguf", size, "nvfp4")
        cost = divergence(their_logits(path), our_logits(model[size]))
        print(f"{name} {size} in NVFP4 codes: KL {cost:.1e}")
        assert cost < 0.02
