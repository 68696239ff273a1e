"""GGUF files read back with `gguf`'s own reader, against slices of the same checkpoint.

What llama.cpp makes of them is held in `engines/test_llama_cpp.py`.
"""

import importlib.util
import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from codes import meaning
from command import cli
from folders import edit_elastic, edit_json, edit_tensors
from gguf import GGUFReader
from gguf.quants import dequantize
from gguf_files import ARCH, MODELS, aligned, checkpoint, export, fields, translated, values
from safetensors.torch import load_file

from star_elastic.checkpoint import Checkpoint
from star_elastic.export.gguf import make_plan, type_of, write_gguf
from star_elastic.folder import CheckpointError, atomic_file
from star_elastic.precision import format_of
from star_elastic.quantize import make_plan as quantization
from star_elastic.quantize import quantize_checkpoint
from star_elastic.slicing import custom, slice_checkpoint


@pytest.mark.parametrize("name", MODELS)
def test_a_file_holds_the_slice(name: str, tmp_path: Path) -> None:
    opened = checkpoint(tmp_path / "e", name)
    for size in opened.space.sizes:
        slice_checkpoint(opened, tmp_path / size, size)
        export(opened, tmp_path / f"{size}.gguf", size)
        found, expected = values(tmp_path / f"{size}.gguf"), translated(tmp_path / size)
        assert found.keys() == expected.keys()
        for key, array in expected.items():
            assert found[key].shape == array.shape, key
            assert np.array_equal(found[key], array), key


@pytest.mark.parametrize("name", MODELS)
def test_what_a_file_says_of_itself(name: str, tmp_path: Path) -> None:
    opened = checkpoint(tmp_path / "parent", name)
    size, said = opened.size("small"), fields(export(opened, tmp_path / "f.gguf").path)
    arch = said["general.architecture"]
    assert arch == {**ARCH, "qwen2": "llama"}.get(name, name)
    assert said[f"{arch}.embedding_length"] == size.config["hidden_size"]
    assert said[f"{arch}.attention.head_count"] == size.config["num_attention_heads"]
    assert said[f"{arch}.attention.key_length"] == 8
    assert said[f"{arch}.block_count"] == size.config["num_hidden_layers"]
    assert said["star_elastic.total_params"] == size.total_params
    assert said["star_elastic.active_params"] == size.active_params
    assert json.loads(said["star_elastic.config"]) == size.config
    assert said["general.name"] == "parent small" and said["general.file_type"] == 0


def test_zeros_tell_the_kinds_of_layers(tmp_path: Path) -> None:
    said = fields(export(checkpoint(tmp_path / "e"), tmp_path / "f.gguf", "full").path)
    assert said["nemotron_h_moe.attention.head_count_kv"] == [0, 0, 0, 2, 0, 0]
    assert said["nemotron_h_moe.feed_forward_length"] == [0, 16, 0, 0, 16, 16]
    assert said["nemotron_h_moe.expert_weights_scale"] == 2.5


def test_the_licence_is_the_parents(tmp_path: Path) -> None:
    opened = checkpoint(tmp_path / "e")
    assert "general.license" not in fields(export(opened, tmp_path / "a.gguf").path)
    (tmp_path / "e" / "README.md").write_text("---\nlicense: other\nlicense_name: x-1\n---\nHi\n")
    said = fields(export(opened, tmp_path / "b.gguf").path)
    assert (said["general.license"], said["general.license.name"]) == ("other", "x-1")


@pytest.mark.parametrize(
    ("name", "changes", "complaint"),
    [
        ("moe", dict(hybrid_override_pattern="MEM*-E"), "layers_block_type has mlp .* and moe"),
        ("moe", dict(time_step_limit=(0.1, 1.0)), r"time_step_limit = \(0.1, 1.0\)"),
        ("moe", dict(mlp_hidden_act="silu"), "mlp_hidden_act = silu: llama.cpp has relu2 only"),
        ("moe", dict(mlp_bias=True), "shared_experts.up_proj.bias: llama.cpp has no place"),
        ("moe", dict(use_bias=True), "layers.0.mixer.in_proj.bias: llama.cpp has no place"),
        ("qwen3", dict(attention_bias=True), "o_proj.bias: llama.cpp has no place"),
        ("qwen3_moe", dict(mlp_only_layers=[1]), r"mlp_only_layers = \[1\]"),
        ("qwen3_moe", dict(norm_topk_prob=False), "norm_topk_prob = False"),
        ("llama", dict(hidden_act="gelu"), "hidden_act = gelu"),
        (
            "qwen2",
            dict(rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)),
            "rope_parameters.rope_type = dynamic",
        ),
        (
            "qwen2",
            dict(use_sliding_window=True, sliding_window=8, max_window_layers=1),
            "layer_types = sliding_attention",
        ),
    ],
)
def test_models_that_llama_cpp_has_not(
    name: str, changes: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    opened = checkpoint(tmp_path / "e", name, **changes)
    with pytest.raises(ValueError, match=f"{tmp_path}/e/.*{complaint}"):
        export(opened, tmp_path / "f.gguf", "full")
    assert not (tmp_path / "f.gguf").exists()


def test_a_quantized_parent_is_refused_by_name(tmp_path: Path) -> None:
    checkpoint(tmp_path / "e", "qwen3")
    coded = "model.layers.0.mlp.up_proj.weight"

    def to_fp8(tensors: dict[str, torch.Tensor]) -> None:
        tensors[coded] = tensors[coded].to(torch.float8_e4m3fn)
        tensors[f"{coded}_scale"] = torch.ones(1)

    edit_tensors(tmp_path / "e", to_fp8)
    edit_json(tmp_path / "e" / "config.json", lambda c: c.update(quantization_config={"x": 1}))
    edit_elastic(tmp_path / "e", lambda declared: declared.update(digests={}))
    with pytest.raises(CheckpointError, match="model.safetensors: .*not to NVFP4 .* export the"):
        export(Checkpoint.open(tmp_path / "e"), tmp_path / "f.gguf")


def test_experts_that_are_codes_in_part(tmp_path: Path) -> None:
    """A stack has one type."""
    planned = quantization(aligned(tmp_path / "e"), format_of("nvfp4"), ["*.experts.3.up_proj"])
    quantize_checkpoint(planned, tmp_path / "q", drop=True)
    with pytest.raises(CheckpointError, match="only some of its layer's experts are codes"):
        export(Checkpoint.open(tmp_path / "q"), tmp_path / "f.gguf", "full", "nvfp4")


@pytest.mark.parametrize("name", ["moe", "llama-tied"])
def test_nvfp4_codes_are_the_parents(name: str, tmp_path: Path) -> None:
    """What they stand for, in `gguf`'s own reading, is what they stand for in the parent."""
    opened = aligned(tmp_path / "e", name)
    planned = quantization(opened, format_of("nvfp4"), ["*.q_proj"])
    quantize_checkpoint(planned, tmp_path / "q", drop=True)
    coded = Checkpoint.open(tmp_path / "q")
    with pytest.raises(CheckpointError, match="quantized already: --type nvfp4 takes the codes"):
        export(coded, tmp_path / "f.gguf", "full", "q8_0")
    written = export(coded, tmp_path / "f.gguf", "full", "nvfp4")
    found = values(written.path)
    expected = translated(tmp_path / "q", meaning(load_file(tmp_path / "q" / "model.safetensors")))
    assert found.keys() == expected.keys() | {key for key in found if key.endswith(".scale")}
    for key, array in expected.items():
        scale = found.get(f"{key.removesuffix('.weight')}.scale", np.ones(1, np.float32))
        whole = scale.reshape(-1, 1, 1) if len(scale) > 1 else scale
        assert np.allclose(found[key] * whole, array, rtol=1e-6, atol=0), key
    assert written.codes["NVFP4"] > 5
    types = {t.name: t.tensor_type.name for t in GGUFReader(written.path).tensors}
    assert {types[key] for key in types if "attn_q.weight" in key} == {"F32"}  # kept, as stored


def codes_of(kind: str, name: str) -> str:
    """MXFP4 is for experts, NVFP4 for the matrices of layers; Q8_0 for the rest."""
    is_rest = "_exps" not in name if kind == "mxfp4" else not name.startswith("blk")
    return "Q8_0" if kind in ("mxfp4", "nvfp4") and is_rest else kind.upper()


def test_types_of_fewer_bits(tmp_path: Path) -> None:
    """Matrices in codes; vectors, norms, gates and convolutions as they are."""
    opened = aligned(tmp_path / "e")
    exact = values(export(opened, tmp_path / "f32.gguf", "full").path)
    for kind, close in (
        ("f16", 1e-3),
        ("bf16", 1e-2),
        ("q8_0", 1e-2),
        ("mxfp4", 0.5),
        ("nvfp4", 0.2),
    ):
        written = export(opened, tmp_path / f"{kind}.gguf", "full", kind)
        assert written.bytes == (tmp_path / f"{kind}.gguf").stat().st_size
        scales = {n.replace(".scale", ".weight"): v for n, v in values(written.path).items()}
        for tensor in GGUFReader(written.path).tensors:
            there, name = tensor.tensor_type.name, tensor.name
            found = dequantize(tensor.data, tensor.tensor_type)
            if any(part in name for part in ("norm", "bias", "gate", "conv", "ssm_a", "ssm_d")):
                assert there == "F32" and np.array_equal(found, exact[name])
                continue
            if name.endswith(".scale"):  # of NVFP4, beside its codes
                continue
            assert there == codes_of(kind, name)
            if kind == "nvfp4" and there == "NVFP4":
                found = found * scales[name].reshape(-1, *[1] * (found.ndim - 1))
            apart = np.abs(found - exact[name]).max() / np.abs(exact[name]).max()
            assert 0 < apart < close


@pytest.mark.parametrize("kind", ["q8_0", "q4_k_m"])
def test_widths_that_fill_no_blocks(kind: str, tmp_path: Path) -> None:
    """Refused with a size that passes, if there is one; other types on request."""
    opened = aligned(tmp_path / "e")
    with pytest.raises(ValueError) as refusal:
        export(opened, tmp_path / "f.gguf", "small", kind)
    said, block = str(refusal.value), type_of(kind).block
    assert "hidden_size = 24: the input of backbone.embeddings.weight, 24, is no multiple" in said
    if kind == "q4_k_m":
        assert "--type q8_0 wants multiples of 32 only" in said and "nearest" not in said
        return
    assert "Sizes that fit: full" in said
    flags = shlex.split(said.partition("the nearest that fits: ")[2])
    near = dict(flag.split("=") for flag in flags if flag != "--set")
    size = custom(opened, {name: int(value) for name, value in near.items()})
    plan = make_plan(opened, size, type_of(kind))
    assert all(e.shape[-1] % block == 0 for e in plan.entries if e.is_matrix)
    written = export(opened, tmp_path / "f.gguf", "small", kind, fallback=True)
    assert written.codes["F16"] and written.codes["Q8_0"]


def test_unknown_types() -> None:
    with pytest.raises(ValueError, match="--type q9: not one of f32, f16, bf16, q8_0"):
        type_of("q9")


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is not None, reason="it is installed")
def test_codes_of_llama_cpps_own_without_it(tmp_path: Path) -> None:
    opened = checkpoint(tmp_path / "e")
    with pytest.raises(ValueError, match="pip install llama-cpp-python"):
        export(opened, tmp_path / "f.gguf", kind="q6_k", fallback=True)
    assert [path.name for path in tmp_path.iterdir()] == ["e"]


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    opened = checkpoint(tmp_path / "e")
    out = tmp_path / "new" / "f.gguf"
    first = export(opened, out).path.read_bytes()
    with pytest.raises(FileExistsError, match="f.gguf"):
        export(opened, out)
    (out.parent / ".f.gguf.partial").write_bytes(b"of a killed writer" * 10**5)
    plan = make_plan(opened, opened.size("small"), type_of("f32"))
    write_gguf(plan, out, overwrite=True)
    assert out.read_bytes() == first
    edit_tensors(tmp_path / "e", lambda t: t["lm_head.weight"].fill_(1e6))  # beyond f16
    plan = make_plan(Checkpoint.open(tmp_path / "e"), opened.size("small"), type_of("f16"))
    with pytest.raises(ValueError, match="lm_head.weight: values beyond f16"):
        write_gguf(plan, out, overwrite=True)
    assert out.read_bytes() == first
    assert [path.name for path in out.parent.iterdir()] == ["f.gguf"]


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    out = tmp_path / "f.gguf"
    with atomic_file(out) as held:
        held.write_bytes(b"mine")
        with pytest.raises(BlockingIOError, match="another process is writing"), atomic_file(out):
            pass
    assert out.read_bytes() == b"mine"
    with pytest.raises(IsADirectoryError, match="name the file"), atomic_file(tmp_path, True):
        pass


def test_the_checkpoints_own_files_stay(tmp_path: Path) -> None:
    opened = checkpoint(tmp_path / "e")
    plan = make_plan(opened, opened.size("small"), type_of("f32"))
    with pytest.raises(ValueError, match="export: .*model.safetensors"):
        write_gguf(plan, tmp_path / "e" / "model.safetensors", overwrite=True)


def test_the_verb(tmp_path: Path) -> None:
    opened = checkpoint(tmp_path / "e")
    edit_elastic(tmp_path / "e", lambda e: [s.update(trained=False) for s in e["submodels"][1:]])
    words = ["export", tmp_path / "e", "--to", "gguf"]
    done = cli(*words, "--size", "small", "--type", "bf16", "--out", tmp_path / "a.gguf")
    assert f"a.gguf: small, {opened.size('small').total_params:,} parameters" in done.stdout
    assert "BF16" in done.stdout and "never trained" in done.stderr
    done = cli(*words, "--set", "hidden_size=24", "--out", tmp_path / "b.gguf")
    assert fields(tmp_path / "b.gguf")["nemotron_h_moe.embedding_length"] == 24
    assert "nobody trained or measured this very size" in done.stderr
    failed = cli(*words, "--out", tmp_path / "c.gguf", check=False)
    assert failed.stderr.startswith("error: export: say either")
