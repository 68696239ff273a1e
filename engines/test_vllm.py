"""The plugin inside a real vLLM: a size that it loads is the slice, as stock transformers runs it.

Tiny models, greedy decoding, one engine after the other in this process. `make test-engines`.
"""

import gc
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from codes import quantize as as_codes
from models import ORDER, letters_tokenizer, tiny
from transformers import AutoModelForCausalLM
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

from star_elastic.checkpoint import Checkpoint
from star_elastic.model import ElasticModel
from star_elastic.precision import format_of
from star_elastic.quantize import make_plan, quantize_checkpoint
from star_elastic.slicing import slice_checkpoint
from star_elastic.submodel import ElasticSpace

PROMPTS = [[5, 9, 13, 2, 7], [1, 33, 21, 40, 40, 2, 11, 60, 8]]
NEW = 20  # tokens
CLOSE = 5e-5  # of a log-probability in fp32; seen were 7e-6

# Attention kernels want heads of 32 channels and more, kernels of codes blocks of 64.
_DECODER: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "head_dim": 32,
    "attention_bias": False,
}
_DECODER_SIZES: dict[str, dict[str, int]] = {
    "full": {},
    "medium": {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 1},
    "small": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_hidden_layers": 1,
    },
}
_NO_HEAD_DIM = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}
_NO_HEAD_DIM_SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
_HYBRID: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "head_dim": 32,
    "mamba_head_dim": 32,
    "ssm_state_size": 16,
    "moe_intermediate_size": 128,
    "moe_shared_expert_intermediate_size": 128,
}
_HYBRID_SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "mamba_num_heads": 4,
    "num_hidden_layers": 5,
}
_EXPERTS_SMALL = {
    "moe_intermediate_size": 64,
    "moe_shared_expert_intermediate_size": 64,
    "n_routed_experts": 4,
    "num_experts_per_tok": 1,
}


@dataclass(frozen=True)
class Case:
    """A tiny parent and its sizes."""

    family: str
    fields: Mapping[str, Any]
    sizes: Mapping[str, dict[str, int]]
    order: list[int] | None = None


CASES = {
    "llama": Case("llama", _DECODER | {"mlp_bias": False}, _DECODER_SIZES),
    "llama-tied": Case("llama-tied", _DECODER, _DECODER_SIZES),
    "qwen3": Case("qwen3", _DECODER, _DECODER_SIZES),
    "qwen2": Case("qwen2", _NO_HEAD_DIM, {"full": {}, "small": _NO_HEAD_DIM_SMALL}),
    "qwen3_moe": Case(
        "qwen3_moe",
        _NO_HEAD_DIM | {"moe_intermediate_size": 64},
        {
            "full": {},
            "small": {"hidden_size": 64, "moe_intermediate_size": 32}
            | {"num_experts": 4, "num_experts_per_tok": 1, "num_hidden_layers": 2},
        },
    ),
    "nemotron_h-dense": Case(
        "nemotron_h",
        _HYBRID | {"hybrid_override_pattern": "M-*M-*"},
        {"full": {}, "medium": {"mamba_head_dim": 16}, "small": _HYBRID_SMALL},
    ),
    "nemotron_h-moe": Case(
        "nemotron_h",  # MEM*-E
        _HYBRID,
        {"full": {}, "medium": {"n_routed_experts": 4}, "small": _HYBRID_SMALL | _EXPERTS_SMALL},
    ),
    "nemotron_h-groups": Case(
        "nemotron_h",
        _HYBRID | {"n_routed_experts": 8, "n_group": 4, "topk_group": 2},
        {"full": {}, "small": _HYBRID_SMALL},
    ),
    "nemotron_h-latent": Case(
        "nemotron_h-latent",  # MEM*-, biases in MLPs and mixers
        _HYBRID | {"moe_latent_size": 64},
        {"full": {}, "small": _HYBRID_SMALL | {"moe_latent_size": 32, "num_hidden_layers": 4}},
    ),
}
SIZES = [(name, size) for name, case in CASES.items() for size in case.sizes]


@dataclass(frozen=True)
class Said:
    """What a model says after a prompt: tokens, and the log-probabilities of the likeliest."""

    tokens: list[int]
    likely: list[dict[int, float]]


def parent_of(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """An elastic checkpoint of a case, on disk."""
    case = CASES[name]
    model = tiny(case.family, **case.fields).to(dtype)
    model.config.dtype = dtype
    elastic = ElasticModel(model, layer_order=ORDER[case.family])
    elastic.space = ElasticSpace.of(elastic.layout, case.sizes, trained=True)
    elastic.save_pretrained(folder, overwrite=True)
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: parent_of(name, tmp_path_factory.mktemp(name) / "elastic") for name in CASES}


@contextmanager
def engine(path: Path, overrides: Any, **options: Any) -> Iterator[LLM]:
    defaults: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 64,
        "max_num_batched_tokens": 64,
        "max_num_seqs": 4,
        "skip_tokenizer_init": True,
    }
    llm = None
    try:
        llm = LLM(str(path), hf_overrides=overrides, **defaults | options)
        yield llm
    finally:
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def vllm_says(path: Path, size: str | None = None, **options: Any) -> list[Said]:
    """Both prompts, in one batch."""
    with engine(path, {"elastic_size": size} if size else {}, **options) as llm:
        wanted = SamplingParams(
            max_tokens=NEW, temperature=0, ignore_eos=True, detokenize=False, logprobs=5
        )
        prompts = [{"prompt_token_ids": ids} for ids in PROMPTS]
        found = [answer.outputs[0] for answer in llm.generate(prompts, wanted, use_tqdm=False)]
        return [
            Said(list(one.token_ids), [{k: p.logprob for k, p in n.items()} for n in one.logprobs])
            for one in found
        ]


@torch.no_grad()
def transformers_says(path: Path, heard: list[Said], dtype: Any = torch.float32) -> list[Said]:
    """The same by the stock class; log-probabilities of the tokens that were heard, in full."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    model.set_experts_implementation("eager")
    found = []
    for ids, other in zip(PROMPTS, heard, strict=True):
        prompt = torch.tensor([ids])
        tokens = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NEW,
            do_sample=False,
        )[0, len(ids) :].tolist()
        whole = torch.tensor([ids + other.tokens])
        logits = model(whole, use_cache=False).logits[0, len(ids) - 1 : -1]
        rows = logits.float().log_softmax(-1).tolist()
        found.append(Said(tokens, [dict(enumerate(row)) for row in rows]))
    return found


def furthest(some: list[Said], others: list[Said]) -> float:
    """The largest difference of two log-probabilities of one token."""
    return max(
        abs(value - there[token])
        for one, other in zip(some, others, strict=True)
        for here, there in zip(one.likely, other.likely, strict=True)
        for token, value in here.items()
    )


def tokens_of(said: list[Said]) -> list[list[int]]:
    return [one.tokens for one in said]


@pytest.mark.parametrize(("name", "size"), SIZES, ids=lambda value: str(value))
def test_a_size_is_the_slice_in_transformers(
    name: str, size: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    path = checkpoints[name]
    slice_checkpoint(Checkpoint.open(path), tmp_path / "slice", size)
    heard = vllm_says(path, size)
    expected = transformers_says(tmp_path / "slice", heard)
    assert tokens_of(heard) == tokens_of(expected)
    print(f"{name} {size}: {furthest(heard, expected):.1e}")
    assert furthest(heard, expected) < CLOSE


@pytest.mark.parametrize("name", ["llama", "nemotron_h-moe"])
def test_half_precision(name: str, tmp_path: Path) -> None:
    """vLLM on the slice computes the very same; transformers rounds elsewhere."""
    path = parent_of(name, tmp_path / "elastic", torch.bfloat16)
    slice_checkpoint(Checkpoint.open(path), tmp_path / "slice", "small")
    heard = vllm_says(path, "small", dtype="auto")
    same = vllm_says(tmp_path / "slice", dtype="auto")
    assert tokens_of(heard) == tokens_of(same)
    assert furthest(heard, same) == 0
    expected = transformers_says(tmp_path / "slice", heard, torch.bfloat16)
    far = furthest(heard, expected)
    print(f"{name} small, bfloat16: {far:.1e} from transformers")
    assert far < 0.25


def test_compiled_graphs_hold_the_experts(checkpoints: dict[str, Path]) -> None:
    path = checkpoints["nemotron_h-moe"]
    compiled = vllm_says(path, "small", enforce_eager=False)
    eager = vllm_says(path, "small")
    assert tokens_of(compiled) == tokens_of(eager)
    assert furthest(compiled, eager) < CLOSE


def test_without_a_size_the_parent_is_stock(checkpoints: dict[str, Path]) -> None:
    with engine(checkpoints["llama"], {}) as llm:
        assert llm.llm_engine.vllm_config.load_config.load_format == "auto"
    stock, full = vllm_says(checkpoints["llama"]), vllm_says(checkpoints["llama"], "full")
    assert tokens_of(stock) == tokens_of(full)
    assert furthest(stock, full) == 0


def test_fields_tell_a_size_that_nobody_named(checkpoints: dict[str, Path]) -> None:
    fields = CASES["qwen3"].sizes["small"]
    said = ", ".join(f"{field}={value}" for field, value in fields.items())
    by_fields = vllm_says(checkpoints["qwen3"], said)
    by_name = vllm_says(checkpoints["qwen3"], "small")
    assert tokens_of(by_fields) == tokens_of(by_name)
    assert furthest(by_fields, by_name) == 0


def test_the_config_of_a_size_is_derived_from(checkpoints: dict[str, Path]) -> None:
    """What vLLM makes of a config: widths, the cache's layers, the experts."""
    with engine(checkpoints["nemotron_h-moe"], {"elastic_size": "small"}) as llm:
        config = llm.llm_engine.vllm_config.model_config
        assert config.get_hidden_size() == 64
        assert config.hf_config.hybrid_override_pattern == "EM*-E"
        assert config.get_num_experts() == 4
        assert config.hf_config.num_experts_per_tok == 1


@pytest.mark.parametrize(
    ("overrides", "options", "message"),
    [
        ({"elastic_size": "tiny"}, {}, "no size 'tiny'; there are full, medium, small"),
        ({"elastic_size": "hidden_size=4096"}, {}, "hidden_size = 4096 is larger than"),
        ({"elastic_size": "hidden_size=big"}, {}, "hidden_size=big: not of the form field=number"),
        ({"elastic_size": 3}, {}, "elastic_size = 3: not a size's name"),
        ({"elastic_size": {"hidden_size": 64}}, {}, "not heard of in time"),
        ({"elastic_size": "small"}, {"load_format": "pt"}, "load_format 'pt' cannot cut"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_served_is_said(
    overrides: Any, options: Any, message: str, checkpoints: dict[str, Path]
) -> None:
    with pytest.raises(ValueError) as caught, engine(checkpoints["llama"], overrides, **options):
        pass
    assert message in str(caught.value)


def test_a_function_of_overrides_is_not_ignored(checkpoints: dict[str, Path]) -> None:
    def small(config: Any) -> Any:
        config.elastic_size = "small"
        return config

    with (
        pytest.raises(ValueError, match="not heard of in time"),
        engine(checkpoints["llama"], small),
    ):
        pass


def test_weights_that_changed_are_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    path = parent_of("llama", tmp_path / "elastic")
    with open(path / "model.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x3f")
    with pytest.raises(ValueError, match="digest differs"), engine(path, {"elastic_size": "small"}):
        pass


@pytest.mark.parametrize("form", ["int8", "int4", "fp8-rows"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "nemotron_h-moe"])
def test_codes_and_scales_are_cut(name: str, form: str, tmp_path: Path) -> None:
    """A size out of a quantized parent is what vLLM makes of the slice of that parent."""
    path = quantized(name, form, tmp_path)
    slice_checkpoint(Checkpoint.open(path), tmp_path / "slice", "small")
    heard = vllm_says(path, "small", dtype="bfloat16")
    expected = vllm_says(tmp_path / "slice", dtype="bfloat16")
    assert tokens_of(heard) == tokens_of(expected)
    assert furthest(heard, expected) == 0


def quantized(name: str, form: str, folder: Path) -> Path:
    """A quantized parent; `fp8-rows` as other tools write it, with a scale of each row."""
    plain = parent_of(name, folder / "plain", torch.bfloat16)
    if form == "fp8-rows":
        as_codes(plain, "fp8_rows")
        edit_config(plain, quantization_config=FP8_ROWS)
        return plain
    is_int4 = form == "int4"
    keep = ["*.in_proj.*"] if is_int4 and "nemotron" in name else []  # rows in 32s, says the kernel
    planned = make_plan(Checkpoint.open(plain), format_of(form, 64 if is_int4 else None), keep)
    quantize_checkpoint(planned, folder / "quantized")
    return folder / "quantized"


FP8_ROWS = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True},
            "input_activations": {
                "num_bits": 8,
                "type": "float",
                "strategy": "token",
                "symmetric": True,
                "dynamic": True,
            },
        }
    },
}


def edit_config(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | changes))


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two ranks want two cores")
@pytest.mark.parametrize("name", ["llama", "nemotron_h-moe"])
def test_two_ranks_shard_what_was_cut(
    name: str, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rank is a process of its own, with the plugin loaded by vLLM itself."""
    one = vllm_says(checkpoints[name], "small")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    two = vllm_says(checkpoints[name], "small", tensor_parallel_size=2)
    assert tokens_of(one) == tokens_of(two)
    print(f"{name}, two ranks: {furthest(one, two):.1e}")
    assert furthest(one, two) < CLOSE


def test_the_server_answers_with_a_size(tmp_path: Path) -> None:
    path = parent_of("llama", tmp_path / "elastic")
    letters_tokenizer().save_pretrained(path)
    slice_checkpoint(Checkpoint.open(path), tmp_path / "slice", "small")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(path)]
    command += ["--hf-overrides", json.dumps({"elastic_size": "small"}), "--dtype", "float32"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--enforce-eager"]
    command += ["--max-model-len", "64", "--max-num-batched-tokens", "64", "--max-num-seqs", "4"]
    with open(tmp_path / "log", "wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        answer = asked(f"http://127.0.0.1:{port}", server, tmp_path / "log")
    finally:
        server.terminate()
        server.wait(60)
    expected = transformers_says(tmp_path / "slice", [Said([1], [])] * len(PROMPTS))
    assert answer["choices"][0]["token_ids"] == expected[0].tokens


def asked(url: str, server: subprocess.Popen[bytes], log: Path) -> dict[str, Any]:
    """One completion of a server, once it is up."""
    body = {"prompt": PROMPTS[0], "max_tokens": NEW, "temperature": 0, "ignore_eos": True}
    data = json.dumps(body | {"return_token_ids": True}).encode()
    for _ in range(180):
        assert server.poll() is None, log.read_text()[-2000:]
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
            break
        except OSError:
            time.sleep(1)
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/completions", data, headers)
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)
