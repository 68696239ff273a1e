"""One file, every size at every precision: eight bits read, and cut, at fewer."""

import json
from pathlib import Path

import pytest
import torch
from codes import GROUP, encoded, form_of, meaning, raw
from command import cli
from folders import edit_json
from hypothesis import given, settings
from hypothesis import strategies as st
from models import FAMILIES, logits, token_ids
from safetensors.torch import load_file
from test_quantize import WEIGHTS, parent_of, quantized

from star_elastic.checkpoint import Checkpoint
from star_elastic.model import ElasticModel
from star_elastic.precision import INT8Groups
from star_elastic.slicing import slice_checkpoint


@settings(max_examples=50, deadline=None)
@given(bits=st.integers(2, 8), seed=st.integers(0, 2**32))
def test_fewer_bits_are_the_nearest_of_those_there_are(bits: int, seed: int) -> None:
    """By a table of all numbers that so many bits can say, ties upwards, and no code added."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(16, 64, generator=draw)
    found = encoded(INT8Groups(16), weight)
    codes = found["weight_packed"].view(torch.uint8).int() - 128
    step = 2 ** (8 - bits)
    table = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)) * step
    distance = (codes[..., None] - table).abs()
    nearest = table.flip(0)[distance.flip(-1).argmin(-1)]
    expected = nearest * found["weight_scale"].repeat_interleave(16, 1)
    read = INT8Groups(16, read=bits)
    assert torch.equal(read.decode(found["weight_packed"], found), expected)
    assert torch.equal(raw(read.encode(weight, found)), raw(found["weight_packed"]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_size_at_four_bits(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """The folder that is cut, and the views that are read at four bits, are the same model."""
    parent_of(family, tmp_path / "plain", dtype)
    coded = quantized(Checkpoint.open(tmp_path / "plain"), tmp_path / "q", "int8_groups")
    slice_checkpoint(coded, tmp_path / "cut", size="small", bits=4)
    slice_checkpoint(coded, tmp_path / "whole", size="small")
    cut = Checkpoint.open(tmp_path / "cut")
    declared = json.loads((tmp_path / "cut/config.json").read_text())["quantization_config"]
    assert declared["config_groups"]["group_0"]["weights"]["num_bits"] == 4
    assert declared["format"] == "pack-quantized"
    meant = meaning(load_file(tmp_path / "cut" / WEIGHTS))
    eight = load_file(tmp_path / "whole" / WEIGHTS)
    for name, tensor in load_file(tmp_path / "cut" / WEIGHTS).items():
        if name.endswith("weight_packed"):
            module, form = name.rpartition(".")[0], INT8Groups(GROUP, read=4)
            assert tensor.numel() * 2 == eight[name].numel()
            scales = {"weight_scale": eight[f"{module}.weight_scale"]}
            assert torch.equal(meant[f"{module}.weight"], form.decode(eight[name], scales))
    model, ids = ElasticModel.from_pretrained(tmp_path / "q"), token_ids()
    view = model.at_bits(4)["small"]
    assert model.at_bits(4).copied_bytes(model.at_bits(4).parent) == 0  # the one copy
    alone = ElasticModel.from_pretrained(cut.path)
    assert torch.equal(logits(view, ids), logits(alone.parent, ids))
    assert not torch.equal(logits(view, ids), logits(model["small"], ids))
    four = ElasticModel.from_pretrained(tmp_path / "q", bits=4)
    assert torch.equal(logits(four["small"], ids), logits(view, ids))


@pytest.mark.parametrize("group", [16, 32, 128])
def test_four_bits_of_eight_are_better_than_four_alone(group: int) -> None:
    """Scales are sought for them; eight bits lose a seventh of next to nothing."""
    weight = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0))
    errors = []
    for form in (form_of("int4", group), INT8Groups(group, read=4), INT8Groups(group)):
        found = encoded(form, weight)
        errors.append((form.decode(found[form.codes], found) - weight).square().mean())
    alone, four, eight = errors
    assert four < 0.95 * alone and eight < alone / 150


def test_no_scale_cuts_the_range_short() -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    scale = encoded(INT8Groups(32), weight)["weight_scale"]
    largest = weight.unflatten(1, (-1, 32)).abs().amax(-1)
    assert (largest <= scale * 127.5001).all() and len((largest / scale).round().unique()) > 2


def test_the_verbs(tmp_path: Path) -> None:
    parent_of("nemotron_h", tmp_path / "plain")
    words = ["--format", "int8", "--group", GROUP, "--out", tmp_path / "q"]
    assert "survives" in cli("quantize", tmp_path / "plain", *words).stderr
    cli("slice", tmp_path / "q", "--size", "small", "--bits", "4", "--out", tmp_path / "four")
    cli("slice", tmp_path / "q", "--size", "small", "--out", tmp_path / "eight")
    assert "all values are numbers" in cli("verify", tmp_path / "four", "--finite").stdout
    four, eight = (Checkpoint.open(tmp_path / name).disk_bytes() for name in ("four", "eight"))
    assert four < 0.8 * eight
    out = ["--out", tmp_path / "no"]
    for words, message in (
        ((tmp_path / "q", "--size", "small", "--bits", "3"), "bits 3: engines read codes of 4"),
        ((tmp_path / "plain", "--size", "small", "--bits", "4"), "config.json: quantization_"),
        ((tmp_path / "four", "--set", "hidden_size=32", "--bits", "4"), "num_bits is 4, and"),
    ):
        failed = cli("slice", *words, *out, check=False)
        assert failed.returncode == 1 and message in failed.stderr
    assert not (tmp_path / "no").exists()


def test_a_zero_point_stays_out_of_it(tmp_path: Path) -> None:
    coded = quantized(parent_of("llama", tmp_path / "plain"), tmp_path / "q", "int8_groups")

    def shifted(values: dict) -> None:
        group = values["quantization_config"]["config_groups"]["group_0"]
        group["weights"]["symmetric"] = False

    edit_json(tmp_path / "q/config.json", shifted)
    with pytest.raises(ValueError, match="quantization_config: symmetric is False, and bits 4"):
        slice_checkpoint(Checkpoint.open(coded.path), tmp_path / "cut", size="small", bits=4)
