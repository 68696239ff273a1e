"""Values and nesting on disk, and the verb that tells."""

from pathlib import Path

import pytest
import torch
from folders import EMBEDDINGS, edit_tensors
from models import SMALL, elastic
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from star_elastic.checkpoint import Checkpoint
from star_elastic.cli import build_app
from star_elastic.folder import CheckpointError
from star_elastic.slicing import slice_checkpoint
from star_elastic.verify import check_finite, check_slice


def verify(*words: object) -> Result:
    return CliRunner().invoke(build_app(), ["verify", *map(str, words)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_value_that_is_no_number(tmp_path: Path, dtype: torch.dtype, value: float) -> None:
    model = elastic("llama")
    model.parent.to(dtype)
    model.parent.config.dtype = dtype
    model.layout.config.dtype = dtype
    weight = model.parent.get_parameter("model.norm.weight")
    with torch.no_grad():
        weight[5] = torch.finfo(dtype).max
        weight[6] = torch.finfo(dtype).smallest_normal / 4
    model.save_pretrained(tmp_path / "fine")
    check_finite(Checkpoint.open(tmp_path / "fine"))
    with torch.no_grad():
        weight[7] = value
        weight[9] = value
    model.save_pretrained(tmp_path / "bad")
    with pytest.raises(CheckpointError) as error:
        check_finite(Checkpoint.open(tmp_path / "bad"))
    assert str(error.value) == (
        f"{tmp_path}/bad/model.safetensors: model.norm.weight: 2 values are no numbers, "
        "the first at index 7"
    )


def test_eight_bit_codes_that_are_no_number(tmp_path: Path) -> None:
    from codes import quantize

    elastic("llama").save_pretrained(tmp_path / "q")
    quantize(tmp_path / "q", "fp8")
    check_finite(Checkpoint.open(tmp_path / "q"))
    path = tmp_path / "q/model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name].view(torch.uint8)[1, 2] = 0xFF
    save_file(tensors, path, metadata={"format": "pt"})
    width = tensors[name].shape[1]
    with pytest.raises(CheckpointError, match=f"{name}: 1 values are no .* index {width + 2}"):
        check_finite(Checkpoint.open(tmp_path / "q"))


def test_a_slice_is_recognised(written: Path, tmp_path: Path) -> None:
    opened = Checkpoint.open(written)
    slice_checkpoint(opened, tmp_path / "small", "small")
    assert check_slice(opened, Checkpoint.open(tmp_path / "small")) == SMALL["nemotron_h"]
    assert check_slice(opened, opened) == {}


def test_one_bit_is_noticed(folder: Path, tmp_path: Path) -> None:
    opened = Checkpoint.open(folder)
    slice_checkpoint(opened, tmp_path / "small", "small")
    path = tmp_path / "small/model.safetensors"
    tensors = load_file(path)
    tensors[EMBEDDINGS].view(torch.int32)[-1, -1] ^= 1
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{EMBEDDINGS}: differs from the parent's corner"):
        check_slice(opened, Checkpoint.open(tmp_path / "small"))


def test_a_size_of_another_parent_is_none_of_this(folder: Path, tmp_path: Path) -> None:
    opened = Checkpoint.open(folder)
    elastic("llama").save_pretrained(tmp_path / "llama")
    with pytest.raises(CheckpointError, match="a llama model"):
        check_slice(opened, Checkpoint.open(tmp_path / "llama"))
    elastic("nemotron_h", hidden_size=64).save_pretrained(tmp_path / "wide")
    with pytest.raises(CheckpointError, match="no size of .* larger than the parent's"):
        check_slice(opened, Checkpoint.open(tmp_path / "wide"))


def test_the_verb_tells_what_holds(folder: Path, tmp_path: Path) -> None:
    slice_checkpoint(Checkpoint.open(folder), tmp_path / "small", "small")
    done = verify(folder, "--finite", "--slice", tmp_path / "small")
    assert done.exit_code == 0, done.exception
    for line in (
        "names, shapes and dtypes are the config's",
        "nested sizes: full, small",
        "1 files have their digests",
        "all values are numbers",
        "small: is this checkpoint at hidden_size = ",
    ):
        assert line in done.stdout


def test_the_verb_reads_every_byte(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    done = verify(folder)
    assert isinstance(done.exception, CheckpointError)
    assert "digest differs" in str(done.exception)


def test_it_says_when_nothing_vouches(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: None)
    done = verify(folder)
    assert done.exit_code == 0 and "declares no digests" in done.stderr
