"""Quantizing once for every size: what is written, and that slices of it are exact (I5)."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from codes import NAMES, encoded, form_of, meaning, raw
from command import cli
from compressed_tensors.quantization import QuantizationConfig
from folders import edit_tensors
from models import CONFIGS, FAMILIES, ORDER, same, tiny
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from star_elastic.checkpoint import Checkpoint
from star_elastic.folder import CheckpointError, digest
from star_elastic.model import ElasticModel
from star_elastic.packed import packed_weights
from star_elastic.precision import format_of
from star_elastic.precision.keep import KEPT
from star_elastic.quantize import bytes_to_read, make_plan, quantize_checkpoint
from star_elastic.slicing import slice_checkpoint
from star_elastic.submodel import ElasticSpace, Fields
from star_elastic.verify import check_slice

DTYPES = [torch.bfloat16, torch.float32, torch.float16]
WEIGHTS = "model.safetensors"
# Widths in blocks of sixteen, of the parents and of the sizes that are cut out of them.
_DECODER: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 48}
_HYBRID = _DECODER | {
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 48,
    "mamba_head_dim": 16,
}
_DECODER_SMALL = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1}
_HYBRID_SMALL = {
    "hidden_size": 32,
    "intermediate_size": 16,
    "moe_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_attention_heads": 4,
    "mamba_num_heads": 4,
    "num_hidden_layers": 4,
}
PARENT = dict.fromkeys(FAMILIES, _DECODER) | {
    "nemotron_h": _HYBRID,
    "nemotron_h-latent": _HYBRID | {"moe_latent_size": 32},
    "qwen3_moe": _DECODER | {"moe_intermediate_size": 32},
}
SMALL: dict[str, dict[str, int]] = dict.fromkeys(
    FAMILIES, _DECODER_SMALL | {"num_attention_heads": 4}
) | {
    "nemotron_h": _HYBRID_SMALL,
    "nemotron_h-latent": _HYBRID_SMALL | {"moe_latent_size": 16},
    "qwen2": _DECODER_SMALL | {"num_attention_heads": 2},
    "qwen3_moe": _DECODER_SMALL
    | {"num_attention_heads": 2, "moe_intermediate_size": 16, "num_experts": 4}
    | {"num_hidden_layers": 2},
}


def parent_of(family: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Checkpoint:
    """A parent with two sizes on disk."""
    model = tiny(family, **PARENT[family]).to(dtype)
    model.config.dtype = dtype
    parent = ElasticModel(model, layer_order=ORDER[family])
    sizes: dict[str, Fields] = {"full": {}, "small": SMALL[family]}
    parent.space = ElasticSpace.of(parent.layout, sizes, trained=True)
    parent.save_pretrained(folder)
    return Checkpoint.open(folder)


def quantized(opened: Checkpoint, out: Path, name: str, **more: Any) -> Checkpoint:
    quantize_checkpoint(make_plan(opened, form_of(name)), out, **more)
    return Checkpoint.open(out)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_slice_of_codes_is_the_codes_of_the_slice(
    family: str, name: str, tmp_path: Path
) -> None:
    """I5, with the parent's scales: made anew from the plain slice, bit for bit."""
    form, plain = form_of(name), parent_of(family, tmp_path / "plain")
    coded = quantized(plain, tmp_path / "coded", name)
    slice_checkpoint(coded, tmp_path / "cut", size="small")
    cut = load_file(tmp_path / "cut" / WEIGHTS)
    child = plain.layout.sizes_of(SMALL[family])
    before = dict(plain.tensors(child))
    whole = load_file(tmp_path / "coded" / WEIGHTS)
    seen = 0
    for (new, weight), (other, narrowed) in zip(
        plain.layout.kept(child), before.items(), strict=True
    ):
        assert new == other
        module, parents = new.rpartition(".")[0], weight.name.rpartition(".")[0]
        if f"{parents}.weight_scale" not in whole or not new.endswith(".weight"):
            assert torch.equal(cut[new], narrowed)
            continue
        scales = {
            leaf: coded_part(coded, child, f"{parents}.{leaf}", whole)
            for leaf in ("weight_scale", "weight_scale_2")
            if f"{parents}.{leaf}" in whole
        }
        again = form.encode(narrowed, scales)
        assert torch.equal(raw(again), raw(cut[f"{module}.{form.codes}"]))
        for leaf, scale in scales.items():
            assert torch.equal(raw(cut[f"{module}.{leaf}"]), raw(scale))
        if form.codes == "weight_packed":
            assert cut[f"{module}.weight_shape"].tolist() == list(narrowed.shape)
        seen += 1
    assert seen >= 7
    meant, parent = meaning(cut), meaning(whole)
    for new, weight in plain.layout.kept(child):
        expected = _narrowed(plain, child, weight.name, parent[weight.name])
        assert torch.equal(meant[new], expected), new


def coded_part(coded: Checkpoint, child: Any, name: str, whole: dict[str, Tensor]) -> Tensor:
    """The part of a stored scale that belongs to a size."""
    found = whole[name]
    for position, runs in coded.weights[name].cuts(coded.layout.sizes, child):
        index = torch.cat([torch.arange(start, start + length) for start, length in runs])
        found = found.view(torch.uint8) if found.dtype == torch.float8_e4m3fn else found
        found = found.index_select(position, index)
    return found.view(whole[name].dtype)


def _narrowed(plain: Checkpoint, child: Any, name: str, tensor: Tensor) -> Tensor:
    for position, runs in plain.layout.stored[name].cuts(plain.layout.sizes, child):
        index = torch.cat([torch.arange(start, start + length) for start, length in runs])
        tensor = tensor.index_select(position, index)
    return tensor


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_the_file_holds_what_the_formats_say(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """In one block, held, read twice or by few rows: the same bytes; experts are among them."""
    plain, form = parent_of("nemotron_h", tmp_path / "plain", dtype), form_of(name)
    coded = quantized(plain, tmp_path / "coded", name)
    quantized(plain, tmp_path / "twice", name, held=0, block=512)
    quantized(plain, tmp_path / "rows", name, block=1024)
    found = load_file(tmp_path / "coded" / WEIGHTS)
    first, *others = (tmp_path / each / WEIGHTS for each in ("coded", "twice", "rows"))
    assert all(each.read_bytes() == first.read_bytes() for each in others)
    computed = torch.float32 if dtype == torch.float16 else dtype
    seen = set()
    for tensor_name, tensor in load_file(tmp_path / "plain" / WEIGHTS).items():
        module = tensor_name.rpartition(".")[0]
        if f"{module}.weight_scale" in found and tensor_name.endswith(".weight"):
            seen.add(module)
            for leaf, expected in encoded(form, tensor.to(computed)).items():
                assert torch.equal(raw(found[f"{module}.{leaf}"]), raw(expected))
        else:
            assert torch.equal(found[tensor_name], tensor)
    assert sum(".experts." in module for module in seen) == 2 * 2 * 6
    assert not any("gate" in m or "norm" in m or "embed" in m or "conv" in m for m in seen)
    assert coded.is_quantized and coded.space.sizes.keys() == {"full", "small"}
    assert coded.space.digests == {WEIGHTS: digest(tmp_path / "coded" / WEIGHTS)}


def test_several_files_are_one_checkpoint(sharded: Path, written: Path, tmp_path: Path) -> None:
    """The parent's files go by in their order, whatever it is; the bar ends where it should."""
    planned = [make_plan(Checkpoint.open(each), form_of("fp8")) for each in (sharded, written)]
    assert len({each.file for each in planned[0].checkpoint.stored.values()}) > 3
    moved: list[int] = []
    quantize_checkpoint(planned[0], tmp_path / "several", progress=moved.append)
    quantize_checkpoint(planned[1], tmp_path / "one")
    several, one = (load_file(tmp_path / name / WEIGHTS) for name in ("several", "one"))
    same({k: raw(v) for k, v in several.items()}, {k: raw(v) for k, v in one.items()})
    assert sum(moved) == bytes_to_read(planned[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_keeps_its_own(family: str, tmp_path: Path) -> None:
    """All matrices of the layers but gates become codes; nothing else does."""
    plain = parent_of(family, tmp_path / "plain")
    planned = make_plan(plain, form_of("fp8"))
    assert CONFIGS[family]["model_type"] in KEPT
    for name, weight in plain.layout.stored.items():
        is_gate = name.endswith("gate.weight")
        matrix = len(weight.dims) == 2 and weight.layer is not None and not is_gate
        assert (name in planned.chosen) == matrix, name
        if len(weight.dims) > 1:
            assert (name.rpartition(".")[0] in planned.ignore) != matrix, name


def test_more_may_be_kept(tmp_path: Path) -> None:
    plain = parent_of("nemotron_h", tmp_path / "plain")
    planned = make_plan(plain, form_of("fp8"), ["*.q_proj", "backbone.layers.0.*"])
    kept = {f"backbone.layers.{n}" for n in (0, 3)}
    quantize_checkpoint(planned, tmp_path / "out")
    found = load_file(tmp_path / "out" / WEIGHTS)
    assert "backbone.layers.3.mixer.k_proj.weight_scale" in found
    assert f"{min(kept)}.mixer.in_proj.weight_scale" not in found
    assert "backbone.layers.3.mixer.q_proj.weight_scale" not in found
    declared = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    for module in ("layers.3.mixer.q_proj", "layers.0.mixer.in_proj", "layers.1.mixer.gate"):
        assert f"backbone.{module}" in declared["ignore"]
        assert f"model.{module}" in declared["ignore"]
    assert "lm_head" in declared["ignore"]
    assert "backbone.layers.3.mixer.k_proj" not in declared["ignore"]


@pytest.mark.parametrize("family", ["nemotron_h", "llama"])
def test_attention_may_be_kept(family: str, tmp_path: Path) -> None:
    """And the Mamba layers right before it: here layer 2 and then 3."""
    plain = parent_of(family, tmp_path / "plain")
    chosen = make_plan(plain, form_of("fp8")).chosen
    left = make_plan(plain, form_of("fp8"), ["attention"]).chosen
    kept = {name.removeprefix("model.").removeprefix("backbone.") for name in chosen - left}
    attention = [f"{letter}_proj.weight" for letter in "qkvo"]
    expected = {
        "nemotron_h": ["layers.2.mixer.in_proj.weight", "layers.2.mixer.out_proj.weight"]
        + [f"layers.3.mixer.{name}" for name in attention],
        "llama": [f"layers.{n}.self_attn.{name}" for n in (0, 1) for name in attention],
    }
    assert kept == {*expected[family]}


@pytest.mark.parametrize(
    "keep, message",
    [
        (["*.w_proj.*"], r"--keep \*\.w_proj\.\*: matches no tensor; names are like backbone\."),
        (["*"], r"--keep \*: nothing is left to quantize"),
    ],
)
def test_patterns_that_make_no_sense(keep: list[str], message: str, tmp_path: Path) -> None:
    plain = parent_of("nemotron_h", tmp_path / "plain")
    with pytest.raises(ValueError, match=message):
        make_plan(plain, form_of("fp8"), keep)


def test_columns_that_fill_no_blocks_are_named(tmp_path: Path) -> None:
    plain = parent_of("llama", tmp_path / "plain")
    with pytest.raises(ValueError) as error:
        make_plan(plain, format_of("int4", 40))
    assert "self_attn.q_proj.weight: its 64 columns do not fill blocks of 40" in str(error.value)
    assert "--keep '*.q_proj.*' or a smaller --group would do" in str(error.value)
    others = ["*.self_attn.*", "*.gate_proj.*", "*.up_proj.*"]
    planned = make_plan(plain, format_of("int4", 24), others)
    assert {name.split(".")[-2] for name in planned.chosen} == {"down_proj"}


def test_a_size_that_does_not_survive_is_refused_or_dropped(tmp_path: Path) -> None:
    """Its choices go with it, and the values that would do are named."""
    plain = parent_of("llama", tmp_path / "plain")
    odd: dict[str, Fields] = {
        "full": {},
        "odd": {"intermediate_size": 24},
        **{"small": SMALL["llama"]},
    }
    space = ElasticSpace.of(plain.layout, odd, trained=True)
    planned = make_plan(replace(plain, space=space), form_of("nvfp4"))
    with pytest.raises(ValueError, match=r"size odd: intermediate_size = 24: .* 16 or 32 would do"):
        quantize_checkpoint(planned, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    quantize_checkpoint(planned, tmp_path / "out", drop=True)
    coded = Checkpoint.open(tmp_path / "out")
    assert coded.space.sizes.keys() == {"full", "small"}
    assert coded.space.axes["intermediate_size"].choices == [16, 48]
    assert make_plan(replace(plain, space=space), form_of("int8")) is not None
    with pytest.raises(ValueError, match="do not fill blocks"):
        slice_checkpoint(coded, tmp_path / "cut", fields={"intermediate_size": 24})


def test_the_only_block_of_a_row_is_a_block(tmp_path: Path) -> None:
    """Half of it has no codes of its own, though one scale a row looks like INT8's."""
    model = tiny("llama", **_DECODER | {"intermediate_size": 16})
    ElasticModel(model, layer_order=[1, 0]).save_pretrained(tmp_path / "plain")
    plain = Checkpoint.open(tmp_path / "plain")
    coded = quantized(plain, tmp_path / "coded", "nvfp4")
    with pytest.raises(ValueError, match="elements 0 to 8 do not fill blocks of 16"):
        slice_checkpoint(coded, tmp_path / "cut", fields={"intermediate_size": 8})
    eights = quantized(plain, tmp_path / "eights", "int8")
    slice_checkpoint(eights, tmp_path / "cut", fields={"intermediate_size": 8})
    assert Checkpoint.open(tmp_path / "cut").layout.sizes["intermediate_size"] == 8


def test_what_is_declared_is_what_is_written(tmp_path: Path) -> None:
    """Companions, config and the declaration are the parent's; quality was of other weights."""
    plain = parent_of("nemotron_h", tmp_path / "plain")
    measured = [
        s.model_copy(update={"quality": {"task": {"nll": 1.0}}}) for s in plain.space.submodels
    ]
    (tmp_path / "plain/LICENSE").write_text("as is")
    plain = replace(plain, space=plain.space.model_copy(update={"submodels": measured}))
    coded = quantized(plain, tmp_path / "coded", "nvfp4")
    assert [size.quality for size in coded.space.submodels] == [{}, {}]
    assert coded.space.layer_order == plain.space.layer_order
    assert (tmp_path / "coded/LICENSE").read_text() == "as is"
    mine = json.loads((tmp_path / "coded/config.json").read_text())
    theirs = json.loads((tmp_path / "plain/config.json").read_text())
    for values in (mine, theirs):
        values.pop("elastic_config")
    declared = mine.pop("quantization_config")
    assert mine == theirs
    beside = json.loads((tmp_path / "coded/hf_quant_config.json").read_text())
    assert beside["quantization"].keys() == {
        "quant_algo",
        "kv_cache_quant_algo",
        "group_size",
        "exclude_modules",
    }
    assert declared["quant_method"] == "modelopt" and declared["group_size"] == 16
    assert declared["quant_algo"] == beside["quantization"]["quant_algo"] == "W4A16_NVFP4"
    assert declared["ignore"] == beside["quantization"]["exclude_modules"]
    assert "NVFP4" in (tmp_path / "coded/README.md").read_text()


@pytest.mark.parametrize("name", ["fp8", "int8", "int4", "int8_groups"])
def test_stock_transformers_reads_what_we_mean(name: str, tmp_path: Path) -> None:
    """Through compressed-tensors, the parent and a slice; nothing missing, nothing drawn anew."""
    plain = parent_of("llama", tmp_path / "plain", torch.float32)
    coded = quantized(plain, tmp_path / "coded", name)
    slice_checkpoint(coded, tmp_path / "cut", size="small")
    for folder in (tmp_path / "coded", tmp_path / "cut"):
        declared = json.loads((folder / "config.json").read_text())["quantization_config"]
        assert QuantizationConfig.model_validate(declared).ignore == declared["ignore"]
        how = CompressedTensorsConfig(run_compressed=False)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=how, output_loading_info=True
        )
        model, info = loaded
        assert not info["missing_keys"] and not info["unexpected_keys"]
        meant = meaning(load_file(folder / WEIGHTS))
        state = model.state_dict()
        same({key: state[key] for key in meant}, meant)


def test_codes_are_not_quantized_again(tmp_path: Path) -> None:
    coded = quantized(parent_of("llama", tmp_path / "plain"), tmp_path / "coded", "fp8")
    with pytest.raises(ValueError, match="its weights are quantized already"):
        make_plan(coded, form_of("int8"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_refused(name: str, value: float, tmp_path: Path) -> None:
    parent_of("llama", tmp_path / "plain")
    spoilt = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(tmp_path / "plain", lambda tensors: tensors[spoilt].view(-1)[77].fill_(value))
    plain = Checkpoint.open(tmp_path / "plain")
    with pytest.raises(CheckpointError, match=f"{spoilt}: it has values that are no numbers"):
        quantized(plain, tmp_path / "out", name)
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]


def test_folders_in_the_way(tmp_path: Path) -> None:
    plain = parent_of("llama", tmp_path / "plain")
    planned = make_plan(plain, form_of("fp8"))
    with pytest.raises(ValueError, match="is the checkpoint itself"):
        quantize_checkpoint(planned, tmp_path / "plain", overwrite=True)
    quantize_checkpoint(planned, tmp_path / "out")
    with pytest.raises(FileExistsError):
        quantize_checkpoint(planned, tmp_path / "out")
    quantize_checkpoint(planned, tmp_path / "out", overwrite=True, max_shard_size=20_000)
    files = {path.name: digest(path) for path in (tmp_path / "out").glob("*.safetensors")}
    coded = Checkpoint.open(tmp_path / "out")
    assert len(files) > 2 and coded.space.digests == files
    assert coded.weights.keys() == packed_weights(coded.layout, coded.stored).keys()


def test_the_verb(tmp_path: Path) -> None:
    """Quantize, verify, slice, verify the slice: as a user does."""
    parent_of("nemotron_h", tmp_path / "plain")
    (tmp_path / "plain/router.safetensors").write_bytes(b"a router")
    done = cli("quantize", tmp_path / "plain", "--format", "nvfp4", "--out", tmp_path / "q")
    assert "small: survives" in done.stderr and "tensors in nvfp4" in done.stdout
    coded = Checkpoint.open(tmp_path / "q")
    assert coded.space.digests.keys() == {WEIGHTS, "router.safetensors"}
    assert "nested sizes: full, small" in cli("verify", tmp_path / "q", "--finite").stdout
    cli("slice", tmp_path / "q", "--size", "small", "--out", tmp_path / "s")
    assert check_slice(coded, Checkpoint.open(tmp_path / "s")) == SMALL["nemotron_h"]
    words = ["--out", tmp_path / "i", "--format", "int4"]
    failed = cli("quantize", tmp_path / "plain", *words, check=False)
    assert failed.returncode == 1 and "do not fill blocks of 128" in failed.stderr
    words += ["--keep", "*.down_proj"]
    failed = cli("quantize", tmp_path / "plain", *words, "--group", "32", check=False)
    assert failed.returncode == 1 and "small: does not survive" in failed.stderr
    assert "(--drop leaves such sizes out)" in failed.stderr and not (tmp_path / "i").exists()
    done = cli("quantize", tmp_path / "plain", *words, "--group", "16")
    assert (tmp_path / "i").is_dir() and "small: survives" in done.stderr
