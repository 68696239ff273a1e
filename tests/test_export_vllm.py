"""What the vLLM plugin takes out of a checkpoint; vLLM itself is tried in `engines/`."""

import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from codes import raw
from models import ORDER, tiny
from safetensors.torch import load_file
from test_quantize import PARENT, SMALL

from star_elastic.checkpoint import QUANTIZATION, Checkpoint
from star_elastic.export.vllm.size import choose, config_values, open_at, size_in, tensors_of
from star_elastic.folder import CheckpointError
from star_elastic.model import ElasticModel
from star_elastic.precision import format_of
from star_elastic.quantize import make_plan, quantize_checkpoint
from star_elastic.slicing import slice_checkpoint
from star_elastic.submodel import ElasticSpace

FAMILIES = ["llama", "qwen3", "nemotron_h"]


def parent_of(family: str, folder: Path) -> Checkpoint:
    """A parent with two sizes on disk, in half precision."""
    model = tiny(family, **PARENT[family]).to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    elastic = ElasticModel(model, layer_order=ORDER[family])
    elastic.space = ElasticSpace.of(elastic.layout, {"full": {}, "small": SMALL[family]}, True)
    elastic.save_pretrained(folder)
    return Checkpoint.open(folder)


def quantized(plain: Checkpoint, form: str, folder: Path) -> Checkpoint:
    group = 16 if form == "int4" else None
    quantize_checkpoint(make_plan(plain, format_of(form, group)), folder)
    return Checkpoint.open(folder)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["plain", "fp8", "int8", "int4", "nvfp4"])
def test_tensors_and_config_are_those_of_the_slice(family: str, form: str, tmp_path: Path) -> None:
    """Bit for bit, codes and scales as well: vLLM is told nothing that the folder would not say."""
    parent = parent_of(family, tmp_path / "plain")
    if form != "plain":
        parent = quantized(parent, form, tmp_path / "quantized")
    size = choose(parent, "small")
    slice_checkpoint(parent, tmp_path / "slice", "small")
    expected = load_file(tmp_path / "slice" / "model.safetensors")
    found = dict(tensors_of(parent, size.config))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert torch.equal(raw(found[name].contiguous()), raw(tensor)), name
    values = json.loads(json.dumps(config_values(parent, size)))
    assert values == json.loads((tmp_path / "slice" / "config.json").read_text())
    assert ("quantization_config" in values) == (form != "plain")


def test_dropped_layers_leave_the_list_of_what_is_ignored(tmp_path: Path) -> None:
    parent = quantized(parent_of("nemotron_h", tmp_path / "plain"), "int8", tmp_path / "codes")
    whole = config_values(parent, choose(parent, "full"))["quantization_config"]["ignore"]
    small = config_values(parent, choose(parent, "small"))["quantization_config"]["ignore"]
    # MEM*-E becomes EM*E
    assert {name for name in whole if "gate" in name and "backbone" in name} == {
        "backbone.layers.1.mixer.gate",
        "backbone.layers.5.mixer.gate",
    }
    assert {name for name in small if "gate" in name and "backbone" in name} == {
        "backbone.layers.0.mixer.gate",
        "backbone.layers.3.mixer.gate",
    }


def test_the_file_of_modelopt_counts_where_the_config_is_silent(tmp_path: Path) -> None:
    parent = quantized(parent_of("llama", tmp_path / "plain"), "nvfp4", tmp_path / "codes")
    values = json.loads((parent.path / "config.json").read_text())
    del values["quantization_config"]
    (parent.path / "config.json").write_text(json.dumps(values))
    parent = Checkpoint.open(parent.path)
    said = config_values(parent, choose(parent, "full"))["quantization_config"]
    assert said == json.loads((parent.path / QUANTIZATION).read_text())


def test_one_parent_tensor_at_a_time(tmp_path: Path) -> None:
    """Read, narrowed, gone: what is alive never adds up to more than the largest few."""
    parent = parent_of("nemotron_h", tmp_path / "plain")
    largest = max(each.end - each.start for each in parent.stored.values())
    before = alive()
    most = 0
    for _, tensor in tensors_of(parent, SMALL["nemotron_h"]):
        most = max(most, alive() - before)
        del tensor
    assert 0 < most <= 3 * largest  # the last one, the next one, and a part that had to be copied
    assert 3 * largest < parent.disk_bytes() / 2


def alive() -> int:
    """Bytes of all tensors there are."""
    storages = {}
    for each in gc.get_objects():
        if type(each) is torch.Tensor:
            storage = each.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def test_fields_instead_of_a_name(tmp_path: Path) -> None:
    parent = parent_of("llama", tmp_path / "plain")
    size = choose(parent, "hidden_size=32, num_hidden_layers=1")
    assert size.config == {"hidden_size": 32, "num_hidden_layers": 1}
    assert not size.trained


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("tiny", "no size 'tiny'; there are full, small"),
        ("hidden_size=96", "hidden_size = 96 is larger than the parent's 64"),
        ("width=96", "width is no axis of this llama model"),
        ("hidden_size=", "elastic_size hidden_size=: not of the form field=number"),
    ],
)
def test_unknown_sizes(wanted: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        choose(parent_of("llama", tmp_path / "plain"), wanted)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [(None, None), ({}, None), ({"rope_theta": 1}, None), ({"elastic_size": "s"}, "s")]
    + [(lambda config: config, None)],
)
def test_overrides_that_ask_for_a_size(overrides: Any, expected: str | None) -> None:
    assert size_in(overrides) == expected


def test_a_size_is_a_text() -> None:
    with pytest.raises(ValueError, match="elastic_size = 12: not a size's name"):
        size_in({"elastic_size": 12})


def test_revisions_are_of_hub_ids_only(tmp_path: Path) -> None:
    parent = parent_of("llama", tmp_path / "plain")
    assert open_at(parent.path, "main", check_digests=True).path == parent.path
    with pytest.raises(CheckpointError, match="nobody/nothing@v2: no such folder"):
        open_at("nobody/nothing", "v2", check_digests=True)


def test_importing_needs_no_vllm() -> None:
    code = "import sys, star_elastic.export.vllm.size; print('vllm' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
