"""Cutting codes: what a slice of a quantized folder means is the slice of what the folder means."""

import json
from pathlib import Path

import pytest
import torch
from codes import FORMATS, meaning, quantize
from folders import edit_json
from models import elastic, logits, same, token_ids
from safetensors.torch import load_file, save_file
from torch import Tensor

from star_elastic.checkpoint import Checkpoint
from star_elastic.folder import CheckpointError
from star_elastic.model import ElasticModel
from star_elastic.packed import renumbered
from star_elastic.slicing import slice_checkpoint
from star_elastic.tensors import in_memory
from star_elastic.verify import check_slice

NOT_RUN = ["nvfp4_packed", "mxfp4"]
SIZES = {  # multiples of the blocks of eight
    "nemotron_h": {"hidden_size": 16, "moe_intermediate_size": 8, "num_hidden_layers": 4},
    "llama": {"hidden_size": 16, "intermediate_size": 16},
}
CHANGES = {
    "nemotron_h": {"hidden_size": 32, "moe_intermediate_size": 16, "intermediate_size": 16}
    | {"moe_shared_expert_intermediate_size": 16},
    "llama": {"hidden_size": 32, "intermediate_size": 32},
}


@pytest.fixture(params=["nemotron_h", "llama"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def written(family: str, folder: Path, kind: str) -> dict[str, Tensor]:
    """A quantized folder; returns what it was before."""
    elastic(family, **CHANGES[family]).save_pretrained(folder)
    return quantize(folder, kind)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_slice_means_the_slice_of_what_the_parent_means(
    family: str, kind: str, tmp_path: Path
) -> None:
    before = written(family, tmp_path / "q", kind)
    opened = Checkpoint.open(tmp_path / "q")
    assert opened.is_quantized
    slice_checkpoint(opened, tmp_path / "out", fields=SIZES[family])
    parent = meaning(load_file(tmp_path / "q/model.safetensors"))
    assert parent.keys() == before.keys()
    close = {name: (parent[name] - before[name]).abs().max() for name in before}
    assert max(close.values()) < 0.5  # codes that mean anything at all
    save_file(parent, tmp_path / "q/model.safetensors", metadata={"format": "pt"})
    edit_json(tmp_path / "q/config.json", lambda values: values.pop("quantization_config"))
    plain = Checkpoint.open(tmp_path / "q")
    child = plain.layout.sizes_of(SIZES[family])
    same(meaning(load_file(tmp_path / "out/model.safetensors")), dict(plain.tensors(child)))


@pytest.mark.parametrize("kind", FORMATS)
def test_the_slice_is_a_checkpoint_of_its_own(family: str, kind: str, tmp_path: Path) -> None:
    written(family, tmp_path / "q", kind)
    opened = Checkpoint.open(tmp_path / "q")
    slice_checkpoint(opened, tmp_path / "out", fields=SIZES[family])
    cut = Checkpoint.open(tmp_path / "out")
    assert cut.is_quantized and cut.disk_bytes() == opened.disk_bytes(
        opened.layout.sizes_of(SIZES[family])
    )
    assert check_slice(opened, cut) == SIZES[family]


@pytest.mark.parametrize("kind", ["nvfp4", "int4", "mxfp4"])
def test_a_cut_inside_a_block_is_refused(kind: str, tmp_path: Path) -> None:
    written("llama", tmp_path / "q", kind)
    with pytest.raises(ValueError, match=r"elements 0 to 20 do not fill blocks of 8"):
        slice_checkpoint(
            Checkpoint.open(tmp_path / "q"), tmp_path / "out", fields={"intermediate_size": 20}
        )


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind not in NOT_RUN])
def test_what_others_wrote_is_run(family: str, kind: str, tmp_path: Path) -> None:
    """Scales of activations aside: those stay numbers."""
    written(family, tmp_path / "q", kind)
    coded = ElasticModel.from_pretrained(tmp_path / "q")
    save_file(meaning(load_file(tmp_path / "q/model.safetensors")), tmp_path / "numbers")
    (tmp_path / "numbers").rename(tmp_path / "q/model.safetensors")
    edit_json(tmp_path / "q/config.json", lambda values: values.pop("quantization_config"))
    numbers, ids = ElasticModel.from_pretrained(tmp_path / "q"), token_ids()
    numbers.parent.set_experts_implementation("eager")
    for fields in ({}, SIZES[family]):
        found, expected = (each.submodel(**fields) for each in (coded, numbers))
        assert torch.equal(logits(found, ids), logits(expected, ids))


def test_codes_that_are_told_beside_the_config_only(tmp_path: Path) -> None:
    """As ModelOpt's older exports tell them: in `hf_quant_config.json`."""
    written("llama", tmp_path / "q", "fp8")
    ids, told = token_ids(), ElasticModel.from_pretrained(tmp_path / "q")
    edit_json(tmp_path / "q/config.json", lambda values: values.pop("quantization_config"))
    (tmp_path / "q/hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    beside = ElasticModel.from_pretrained(tmp_path / "q")
    assert torch.equal(logits(beside.parent, ids), logits(told.parent, ids))


@pytest.mark.parametrize("kind", NOT_RUN)
def test_codes_that_are_cut_but_not_run(kind: str, tmp_path: Path) -> None:
    written("llama", tmp_path / "q", kind)
    with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj: no numbers are made of"):
        ElasticModel.from_pretrained(tmp_path / "q")


def test_codes_are_not_ranked(tmp_path: Path) -> None:
    written("llama", tmp_path / "q", "fp8")
    opened = Checkpoint.open(tmp_path / "q")
    with pytest.raises(CheckpointError, match="its weights are quantized"):
        list(in_memory(opened, opened.layout.weights.values()))


def test_scales_of_the_cache_belong_to_their_layer(tmp_path: Path) -> None:
    written("llama", tmp_path / "q", "fp8")
    path = tmp_path / "q/model.safetensors"
    tensors = load_file(path)
    for layer in range(len(Checkpoint.open(tmp_path / "q").layout.blocks)):
        tensors[f"model.layers.{layer}.self_attn.k_proj.k_scale"] = torch.tensor(1.0 + layer)
        tensors[f"model.layers.{layer}.self_attn.v_scale"] = torch.tensor([2.0 + layer])
    save_file(tensors, path, metadata={"format": "pt"})
    opened = Checkpoint.open(tmp_path / "q")
    depth = {"num_hidden_layers": len(opened.layout.blocks) - 1}
    slice_checkpoint(opened, tmp_path / "out", fields=depth)
    kept = opened.layout.kept_layers(opened.layout.sizes_of(depth))
    found = load_file(tmp_path / "out/model.safetensors")
    for position, layer in enumerate(kept):
        assert found[f"model.layers.{position}.self_attn.k_proj.k_scale"] == 1.0 + layer
        assert found[f"model.layers.{position}.self_attn.v_scale"].tolist() == [2.0 + layer]
    ids = token_ids()  # the cache of our models stays numbers
    cut, parent = (ElasticModel.from_pretrained(tmp_path / each) for each in ("out", "q"))
    assert torch.equal(logits(cut.parent, ids), logits(parent.submodel(**depth), ids))


def test_the_declaration_follows_the_layers(tmp_path: Path) -> None:
    written("nemotron_h", tmp_path / "q", "fp8")
    ignored = [f"backbone.layers.{n}.mixer.gate" for n in range(6)] + ["lm_head"]
    edit_json(
        tmp_path / "q/config.json",
        lambda values: values["quantization_config"].update(ignore=ignored),
    )
    beside = {"producer": {}, "quantization": {"quant_algo": "FP8", "exclude_modules": ignored}}
    (tmp_path / "q/hf_quant_config.json").write_text(json.dumps(beside))
    opened = Checkpoint.open(tmp_path / "q")
    slice_checkpoint(opened, tmp_path / "out", fields=SIZES["nemotron_h"])
    kept = opened.layout.kept_layers(opened.layout.sizes_of(SIZES["nemotron_h"]))
    expected = [f"backbone.layers.{n}.mixer.gate" for n, old in enumerate(kept) if old < 6]
    for file in ("config.json", "hf_quant_config.json"):
        found = json.loads((tmp_path / "out" / file).read_text())
        part = found.get("quantization_config") or found["quantization"]
        assert (part.get("ignore") or part["exclude_modules"]) == [*expected, "lm_head"]


def test_patterns_that_tell_layers_by_number_are_refused() -> None:
    kept = {0: 0, 2: 1}
    assert renumbered("re:.*layers.*mixer", kept) == "re:.*layers.*mixer"
    assert renumbered(["a.layers.1.b", "a.layers.2"], kept) == ["a.layers.1"]
    with pytest.raises(ValueError, match="tells layers by number"):
        renumbered("re:.*layers\\.(2|3)\\..*", kept)
    assert renumbered("re:.*layers\\.(2|3)\\..*", {0: 0, 1: 1}) == "re:.*layers\\.(2|3)\\..*"
