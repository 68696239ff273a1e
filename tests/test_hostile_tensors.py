"""Tensors, companions and routers nobody vouches for, and files that change under the reader."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from codes import quantize
from folders import EMBEDDINGS, WEIGHTS, edit_json, edit_tensors
from hostile import answers, promptly, refuses
from models import tiny
from safetensors.torch import load_file, save_file
from torch import Tensor

from star_elastic.checkpoint import Checkpoint
from star_elastic.model import ElasticModel
from star_elastic.slicing import slice_checkpoint

Tensors = dict[str, Tensor]
NORM = "backbone.norm_f.weight"


def to(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({name: change(tensors[name]).contiguous()})


# id -> what is done to the tensors, what the error names
TENSORS: dict[str, tuple[Callable[[Tensors], Any], tuple[str, ...]]] = {
    "missing": (lambda t: t.pop(EMBEDDINGS), (f"{EMBEDDINGS}: missing",)),
    "missing-expert": (
        lambda t: t.pop("backbone.layers.1.mixer.experts.5.up_proj.weight"),
        ("experts.5.up_proj.weight: missing",),
    ),
    "extra": (lambda t: t.update(spare=torch.ones(1)), (WEIGHTS, "spare: not in the model")),
    "extra-expert": (
        lambda t: t.update({"backbone.layers.1.mixer.experts.6.up_proj.weight": torch.ones(1)}),
        ("experts.6.up_proj.weight: not in the model",),
    ),
    "extra-layer": (
        lambda t: t.update({"backbone.layers.6.norm.weight": torch.ones(32)}),
        ("backbone.layers.6.norm.weight: not in the model",),
    ),
    "of-another-layer": (
        lambda t: t.update({"backbone.layers.01.norm.weight": torch.ones(32)}),
        ("backbone.layers.01.norm.weight: not in the model",),
    ),
    "narrow": (to(EMBEDDINGS, lambda t: t[:, :8]), (EMBEDDINGS, "(64, 8), expected (64, 32)")),
    "transposed": (to(EMBEDDINGS, lambda t: t.T), (EMBEDDINGS, "(32, 64), expected (64, 32)")),
    "flat": (to(EMBEDDINGS, lambda t: t.reshape(-1)), (EMBEDDINGS, "(2048,), expected (64, 32)")),
    "one-rank-more": (to(NORM, lambda t: t[None]), (NORM, "shape (1, 32), expected (32,)")),
    "scalar": (to(NORM, lambda t: t[0]), (NORM, "shape (), expected (32,)")),
    "empty": (to(NORM, lambda t: t[:0]), (NORM, "shape (0,), expected (32,)")),
    "half": (to(NORM, Tensor.half), (NORM, "dtype F16, expected float32")),
    "bfloat16": (to(NORM, Tensor.bfloat16), (NORM, "dtype BF16, expected float32")),
    "double": (to(NORM, Tensor.double), (NORM, "dtype F64, expected float32")),
    "whole-numbers": (to(NORM, Tensor.int), (NORM, "dtype I32, expected float32")),
    "yes-or-no": (to(NORM, Tensor.bool), (NORM, "dtype BOOL, expected float32")),
    "float8-without-a-scale": (
        to("lm_head.weight", lambda t: t.to(torch.float8_e4m3fn)),
        ("lm_head.weight: dtype F8_E4M3, and no weight_scale beside it",),
    ),
    "int8-without-a-scale": (
        to("lm_head.weight", Tensor.char),
        ("lm_head.weight: dtype I8, and no weight_scale beside it",),
    ),
    "float8-of-another-kind": (
        to("lm_head.weight", lambda t: t.to(torch.float8_e5m2)),
        ("lm_head.weight: dtype F8_E5M2, expected float32",),
    ),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_of_another_model(folder: Path, name: str) -> None:
    change, named = TENSORS[name]
    edit_tensors(folder, change)
    refuses(folder, *named)


def test_half_a_swap_of_half_precisions(tmp_path: Path) -> None:
    tiny("llama").half().save_pretrained(tmp_path)
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(tmp_path / WEIGHTS).items()}
    save_file(tensors, tmp_path / WEIGHTS)
    refuses(tmp_path, WEIGHTS, "model.embed_tokens.weight: dtype BF16, expected float16 or float32")


Q = "model.layers.0.self_attn.q_proj"
# id -> format, what is done to the codes, what the error names
CODES: dict[str, tuple[str, Callable[[Tensors], Any], tuple[str, ...]]] = {
    "scale-missing": (
        "fp8_rows",
        lambda t: t.pop(f"{Q}.weight_scale"),
        (f"{Q}.weight: dtype F8_E4M3, and no weight_scale beside it",),
    ),
    "scale-of-fewer-rows": (
        "fp8_rows",
        to(f"{Q}.weight_scale", lambda t: t[:-1]),
        (f"{Q}.weight_scale: shape (63, 1) of F32 does not fit (64, 32)",),
    ),
    "scale-of-three-dims": (
        "fp8_rows",
        to(f"{Q}.weight_scale", lambda t: t[None].expand(64, -1, -1)),
        (f"{Q}.weight_scale: shape (64, 64, 1) of F32 does not fit",),
    ),
    "scale-of-no-values": (
        "fp8_rows",
        to(f"{Q}.weight_scale", lambda t: t[:, :0]),
        (f"{Q}.weight_scale: shape (64, 0) of F32 does not fit",),
    ),
    "scale-of-whole-numbers": (
        "fp8_rows",
        to(f"{Q}.weight_scale", Tensor.long),
        (f"{Q}.weight_scale: dtype I64 is none of a scale",),
    ),
    "input-scale-of-two": (
        "fp8",
        lambda t: t.update({f"{Q}.input_scale": torch.ones(2)}),
        (f"{Q}.input_scale: shape (2,), expected one value",),
    ),
    "scale-of-odd-blocks": (
        "nvfp4",
        to(f"{Q}.weight_scale", lambda t: t[:, :3]),
        (f"{Q}.weight_scale: shape (64, 3) of", "does not fit (64, 32)"),
    ),
    "second-scale-missing": (
        "nvfp4",
        lambda t: t.pop(f"{Q}.weight_scale_2"),
        (f"{Q}.weight: dtype U8, and no weight_scale_2 beside it",),
    ),
    "odd-width": (
        "nvfp4",
        to(f"{Q}.weight", lambda t: t[:, :-1]),
        (f"{Q}.weight: shape (64, 15) of U8 does not fit (64, 32)",),
    ),
    "int4-width": (
        "int4",
        to(f"{Q}.weight_packed", lambda t: t[:, :-1]),
        (f"{Q}.weight_packed: shape (64, 3) of I32 does not fit (64, 32)",),
    ),
    "int4-without-its-shape": (
        "int4",
        lambda t: t.pop(f"{Q}.weight_shape"),
        (f"{Q}.weight_packed: dtype I32, and no weight_shape beside it",),
    ),
    "int4-shape-of-three": (
        "int4",
        to(f"{Q}.weight_shape", lambda t: t.new_ones(3)),
        (f"{Q}.weight_shape: not two integers",),
    ),
    "codes-twice": (
        "int4",
        lambda t: t.update({f"{Q}.weight": torch.ones(64, 32)}),
        (f"{Q}.weight_packed: not in the model",),
    ),
}


@pytest.mark.parametrize("name", CODES)
def test_codes_that_do_not_fit(tmp_path: Path, name: str) -> None:
    kind, change, named = CODES[name]
    tiny("llama").save_pretrained(tmp_path)
    quantize(tmp_path, kind)
    tensors = load_file(tmp_path / WEIGHTS)
    change(tensors)
    save_file(tensors, tmp_path / WEIGHTS)
    refuses(tmp_path, WEIGHTS, *named)


def test_codes_that_nothing_declares(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    quantize(tmp_path, "fp8")
    edit_json(tmp_path / "config.json", lambda config: config.pop("quantization_config"))
    refuses(tmp_path, "scale: config.json declares no quantization_config")


def test_what_published_folders_have(tmp_path: Path) -> None:
    """A tied head that is there all the same, and layers of multi-token prediction."""
    for family, spare in (("llama-tied", "lm_head.weight"), ("nemotron_h", "mtp.layers.0.weight")):
        tiny(family).save_pretrained(tmp_path / family)
        tensors = load_file(tmp_path / family / WEIGHTS)
        save_file(tensors | {spare: torch.ones(64, 32)}, tmp_path / family / WEIGHTS)
        assert spare in Checkpoint.open(tmp_path / family).stored


COMPANIONS = ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE"]


def secret(path: Path) -> None:
    (path.parent.parent / "secret").write_text("secret")
    path.symlink_to("../secret")


@pytest.mark.parametrize("file", COMPANIONS)
@pytest.mark.parametrize(
    ("make", "named"),
    [(secret, "a link out of its folder"), (os.mkfifo, "not a regular file")],
    ids=["link", "pipe"],
)
def test_a_companion_that_is_none(
    folder: Path, tmp_path: Path, file: str, make: Callable[[Path], None], named: str
) -> None:
    """Refused when the folder is opened, and, where it came later, when it would be copied."""
    opened = Checkpoint.open(folder)
    (folder / file).unlink(missing_ok=True)
    make(folder / file)
    refuses(folder, f"elastic/{file}: {named}")
    with answers(folder, f"elastic/{file}: {named}"):
        slice_checkpoint(opened, tmp_path / "out", "small")
    assert not (tmp_path / "out").exists()


def grown(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def rewritten(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, (1, 1))  # whatever the resolution of the file system's clock


def replaced(path: Path) -> None:
    stat = path.stat()
    shutil.copy(path, path.with_name("new"))
    os.utime(path.with_name("new"), ns=(stat.st_atime_ns, stat.st_mtime_ns))
    path.with_name("new").replace(path)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (lambda path: os.truncate(path, path.stat().st_size // 2), "tensors end at byte"),
    "emptied": (lambda path: os.truncate(path, 0), "0 bytes, too few for a header"),
    "grown": (grown, "tensors end at byte"),
    "rewritten": (rewritten, "changed since it was opened"),
    "replaced": (replaced, "changed since it was opened"),
    "removed": (Path.unlink, "no such file"),
    "pipe": (pipe, "not a regular file"),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("reader", ["slice", "tensors"])
def test_weights_that_change_once_they_are_verified(
    folder: Path, tmp_path: Path, reader: str, name: str
) -> None:
    opened = Checkpoint.open(folder)
    change, named = CHANGES[name]
    change(folder / WEIGHTS)
    with answers(folder, f"elastic/{WEIGHTS}", named):
        if reader == "slice":
            slice_checkpoint(opened, tmp_path / "out", "small")
        else:
            list(opened.tensors())
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_is_none(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (folder / "tokenizer.json").write_text('{"model": {"type": "BPE"}}')
    with promptly(cpu=10), pytest.raises(ValueError, match="elastic/tokenizer_config.json: "):
        ElasticModel.from_pretrained(folder)
