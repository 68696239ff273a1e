"""Quantized checkpoints run at every size: a stock model on the numbers that codes stand for."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from codes import NAMES, encoded, form_of, meaning
from models import FAMILIES, logits, token_ids, unclamped
from safetensors.torch import load_file, save_file
from test_quantize import WEIGHTS, parent_of, quantized
from transformers import AutoModelForCausalLM

from star_elastic.checkpoint import Checkpoint
from star_elastic.model import ElasticModel
from star_elastic.precision import CodedExperts, CodedLinear, CodedMatrix, matrices
from star_elastic.quantize import make_plan, quantize_checkpoint
from star_elastic.slicing import slice_checkpoint


def in_numbers(folder: Path, out: Path) -> Any:
    """The stock model on what a quantized folder's codes stand for, decoded by the tests' means."""
    out.mkdir()
    values = json.loads((folder / "config.json").read_text())
    for key in ("quantization_config", "elastic_config"):
        values.pop(key, None)
    (out / "config.json").write_text(json.dumps(values))
    save_file(meaning(load_file(folder / WEIGHTS)), out / WEIGHTS)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, experts_implementation="eager", output_loading_info=True
    )
    model, info = loaded
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return unclamped(model.eval())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_size_runs_on_the_parents_codes(family: str, name: str, tmp_path: Path) -> None:
    coded = quantized(parent_of(family, tmp_path / "plain", torch.float32), tmp_path / "q", name)
    slice_checkpoint(coded, tmp_path / "cut", size="small")
    model, alone = (ElasticModel.from_pretrained(tmp_path / each) for each in ("q", "cut"))
    expected = in_numbers(tmp_path / "cut", tmp_path / "numbers")
    ids = token_ids()
    assert torch.equal(logits(model["small"], ids), logits(expected, ids))
    assert torch.equal(logits(alone["full"], ids), logits(expected, ids))
    expected = in_numbers(tmp_path / "q", tmp_path / "parent")
    assert torch.equal(logits(model["full"], ids), logits(expected, ids))
    assert torch.equal(logits(model.parent, ids), logits(expected, ids))


@pytest.mark.parametrize("family", ["nemotron_h", "qwen3_moe", "llama"])
def test_one_copy_serves_all_sizes(family: str, tmp_path: Path) -> None:
    """What a prefix keeps are views; bytes are those on disk."""
    coded = quantized(parent_of(family, tmp_path / "plain"), tmp_path / "q", "nvfp4")
    model = ElasticModel.from_pretrained(tmp_path / "q")
    held = sum(tensor.nbytes for tensor in model.state.values())
    widened = [t for name, t in model.state.items() if "e_score" in name]  # float32 in stock models
    assert held == coded.disk_bytes() + sum(tensor.nbytes // 2 for tensor in widened)
    assert model.copied_bytes(model["full"]) == 0
    fields = {"hidden_size": 48, "intermediate_size": 32}
    assert model.copied_bytes(model.submodel(**fields)) == 0
    kinds = {type(module) for module in model["small"].modules()}
    assert CodedLinear in kinds and (CodedExperts in kinds) == (family != "llama")


def test_matrices_are_decoded_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantized(parent_of("nemotron_h", tmp_path / "plain", torch.float32), tmp_path / "q", "int8")
    model, ids = ElasticModel.from_pretrained(tmp_path / "q"), token_ids()
    whole = logits(model["small"], ids)
    linear = next(m for m in model["small"].modules() if isinstance(m, CodedLinear))
    weight = linear.weight
    monkeypatch.setattr(matrices, "AT_ONCE", 100)
    assert len(list(linear.matrix.parts())) > 5
    assert torch.equal(linear.weight, weight)
    assert torch.allclose(logits(model["small"], ids), whole, atol=1e-5)


def test_some_experts_in_numbers(tmp_path: Path) -> None:
    """A fused tensor of which some matrices are codes and others are not."""
    plain = parent_of("qwen3_moe", tmp_path / "plain", torch.float32)
    keep = ["*.experts.1.*", "*.experts.2.up_proj"]
    quantize_checkpoint(make_plan(plain, form_of("fp8"), keep), tmp_path / "q")
    model, ids = ElasticModel.from_pretrained(tmp_path / "q"), token_ids()
    expected = in_numbers(tmp_path / "q", tmp_path / "numbers")
    assert torch.equal(logits(model["full"], ids), logits(expected, ids))
    slice_checkpoint(Checkpoint.open(tmp_path / "q"), tmp_path / "cut", size="small")
    expected = in_numbers(tmp_path / "cut", tmp_path / "smaller")
    assert torch.equal(logits(model["small"], ids), logits(expected, ids))


def test_it_generates_and_is_measured_as_any(tmp_path: Path) -> None:
    quantized(parent_of("nemotron_h", tmp_path / "plain"), tmp_path / "q", "nvfp4")
    model = ElasticModel.from_pretrained(tmp_path / "q")
    generate: Any = model["small"].generate
    kept = generate(token_ids(), max_new_tokens=8, do_sample=False)
    again = generate(token_ids(), max_new_tokens=8, do_sample=False, use_cache=False)
    assert kept.shape[1] == 13 + 8 and torch.equal(kept, again)
    assert model["small"].dtype == torch.bfloat16
    wide = ElasticModel.from_pretrained(tmp_path / "q", dtype=torch.float32)
    assert wide["small"].dtype == torch.float32


def test_what_is_refused(tmp_path: Path) -> None:
    plain = parent_of("llama", tmp_path / "plain", torch.float32)
    quantized(plain, tmp_path / "q", "fp8")
    model = ElasticModel.from_pretrained(tmp_path / "q")
    with pytest.raises(ValueError, match="its weights are quantized; copy the folder"):
        model.save_pretrained(tmp_path / "copy")
    with pytest.raises(ValueError, match="bits 4: fp8 is not read at fewer than its own 8"):
        model.at_bits(4)
    with pytest.raises(ValueError, match="bits 4: its weights are no codes"):
        ElasticModel.from_pretrained(tmp_path / "plain", bits=4)


@pytest.mark.parametrize("biased", [True, False])
def test_the_kernel_for_few_tokens(biased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it gives is what decoding gives, to the rounding of bfloat16; codes may be cut."""
    draw = torch.Generator().manual_seed(0)
    found = encoded(form_of("int8"), torch.randn(48, 96, generator=draw).bfloat16())
    found["weight"], found["weight_scale"] = found["weight"][:32, :64], found["weight_scale"][:32]
    bias = torch.nn.Parameter(torch.randn(32, generator=draw).bfloat16()) if biased else None
    linear = CodedLinear(CodedMatrix(found, 64), bias, torch.bfloat16)
    hidden = torch.randn(2, 3, 64, generator=draw).bfloat16()
    calls: list[int] = []
    monkeypatch.setattr(linear.matrix, "rows", lambda some: calls.append(1))
    few = linear(hidden)
    assert few.shape == (2, 3, 32) and not calls
    monkeypatch.undo()
    monkeypatch.setattr(matrices, "FEW", 0)
    many = linear(hidden)
    assert torch.allclose(
        few.float(), many.float(), rtol=2**-7, atol=2**-3
    )  # sums of 64 of about 1
    assert not torch.equal(few, torch.zeros_like(few))
