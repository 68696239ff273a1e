"""The folder on disk: bit-exact, and readable by stock classes (I6)."""

import json
from pathlib import Path

import pytest
import torch
from folders import INDEX, WEIGHTS, edit_tensors, stock_load
from models import CONFIGS, FAMILIES, PREFIX, SMALL, elastic, kept_layers, logits, tiny, token_ids
from reference import cut
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from star_elastic.checkpoint import Checkpoint, declare
from star_elastic.folder import CheckpointError
from star_elastic.model import ElasticModel
from star_elastic.slicing import slice_checkpoint


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_is_bit_exact(family: str, tmp_path: Path) -> None:
    model = elastic(family)
    model.save_pretrained(tmp_path / "elastic")
    again = ElasticModel.from_pretrained(tmp_path / "elastic")
    assert again.state.keys() == model.state.keys()
    for name, tensor in model.state.items():
        assert torch.equal(again.state[name], tensor), name
    assert again.sizes == model.sizes
    assert again.space.axes == model.space.axes


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_transformers_loads_the_parent(family: str, tmp_path: Path) -> None:
    model, ids = elastic(family), token_ids()
    model.save_pretrained(tmp_path / "elastic")
    stock = stock_load(tmp_path / "elastic")
    assert torch.equal(logits(stock, ids), logits(model.parent, ids))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", ["full", "small", "prefix"])
def test_a_slice_on_disk_is_the_view(family: str, size: str, tmp_path: Path) -> None:
    model, ids = elastic(family), token_ids()
    model.save_pretrained(tmp_path / "elastic")
    cut_out = slice_checkpoint(Checkpoint.open(tmp_path / "elastic"), tmp_path / "out", size)
    stock = stock_load(tmp_path / "out")
    assert cut_out == model.sizes[size]
    assert sum(p.numel() for p in stock.parameters()) == cut_out.total_params
    assert torch.equal(logits(stock, ids), logits(model[size], ids))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_slice_holds_the_tensors_cut_by_hand(family: str, tmp_path: Path) -> None:
    model = elastic(family)
    model.save_pretrained(tmp_path / "elastic")
    opened = Checkpoint.open(tmp_path / "elastic")
    slice_checkpoint(opened, tmp_path / "out", fields=SMALL[family])
    found = stock_load(tmp_path / "out").state_dict()
    expected = cut(family, model.parent.state_dict(), SMALL[family])
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_slice_of_a_slice_is_the_slice(family: str, tmp_path: Path) -> None:
    elastic(family).save_pretrained(tmp_path / "elastic")
    opened = Checkpoint.open(tmp_path / "elastic")
    slice_checkpoint(opened, tmp_path / "middle", fields=PREFIX[family])
    slice_checkpoint(opened, tmp_path / "once", fields=SMALL[family])
    middle = Checkpoint.open(tmp_path / "middle")
    slice_checkpoint(middle, tmp_path / "twice", fields=SMALL[family])
    once, twice = (load_file(tmp_path / each / WEIGHTS) for each in ("once", "twice"))
    assert once.keys() == twice.keys()
    assert all(torch.equal(tensor, twice[name]) for name, tensor in once.items())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", ["full", "small"])
def test_disk_bytes_are_those_of_the_slice(family: str, size: str, tmp_path: Path) -> None:
    elastic(family).save_pretrained(tmp_path / "elastic")
    opened = Checkpoint.open(tmp_path / "elastic")
    slice_checkpoint(opened, tmp_path / "out", size)
    written = sum(t.nbytes for t in load_file(tmp_path / "out" / WEIGHTS).values())
    assert opened.disk_bytes(opened.layout.sizes_of(opened.size(size).config)) == written


def test_two_dtypes_keep_their_own(tmp_path: Path) -> None:
    tiny("nemotron_h").save_pretrained(tmp_path / "stock")
    parent = AutoModelForCausalLM.from_pretrained(tmp_path / "stock", dtype=torch.bfloat16)
    model = ElasticModel(parent)
    model.save_pretrained(tmp_path / "elastic")
    again = ElasticModel.from_pretrained(tmp_path / "elastic")
    assert {t.dtype for t in model.state.values()} == {torch.bfloat16, torch.float32}
    for name, tensor in model.state.items():
        assert again.state[name].dtype == tensor.dtype, name
        assert torch.equal(again.state[name], tensor), name


def test_config_has_both_layer_patterns(written: Path, tmp_path: Path) -> None:
    slice_checkpoint(Checkpoint.open(written), tmp_path / "out", "small")
    kinds = {"M": "linear_attention", "E": "moe", "*": "full_attention", "-": "mlp"}
    whole = CONFIGS["nemotron_h"]["hybrid_override_pattern"]
    cut_out = "".join(whole[layer] for layer in kept_layers("nemotron_h", SMALL["nemotron_h"]))
    for folder, pattern in ((written, whole), (tmp_path / "out", cut_out)):
        config = json.loads((folder / "config.json").read_text())
        assert config["hybrid_override_pattern"] == pattern
        assert config["layers_block_type"] == [kinds[letter] for letter in pattern]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_slice_is_no_elastic_folder(family: str, tmp_path: Path) -> None:
    elastic(family).save_pretrained(tmp_path / "elastic")
    opened = Checkpoint.open(tmp_path / "elastic")
    slice_checkpoint(opened, tmp_path / "out", "small")
    assert opened.is_elastic and not Checkpoint.open(tmp_path / "out").is_elastic
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "elastic_config" not in config
    for field, value in SMALL[family].items():
        assert config[field] == value


def test_small_shards_have_an_index(shards: Path, written: Path) -> None:
    index = json.loads((shards / INDEX).read_text())
    whole = load_file(written / WEIGHTS)
    assert index["weight_map"].keys() == whole.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())
    for file in set(index["weight_map"].values()):
        tensors = load_file(shards / file)
        held = {name for name, where in index["weight_map"].items() if where == file}
        assert tensors.keys() == held
        assert sum(t.nbytes for t in tensors.values()) <= 20_000 or len(tensors) == 1
        assert all(torch.equal(tensor, whole[name]) for name, tensor in tensors.items())
    assert len(set(index["weight_map"].values())) > 2


def test_sharded_folders_load_and_slice(shards: Path, tmp_path: Path) -> None:
    model, ids = ElasticModel.from_pretrained(shards), token_ids()
    assert torch.equal(logits(stock_load(shards), ids), logits(model.parent, ids))
    opened = Checkpoint.open(shards)
    slice_checkpoint(opened, tmp_path / "out", "small", max_shard_size=5_000)
    assert (tmp_path / "out" / INDEX).is_file()
    assert torch.equal(logits(stock_load(tmp_path / "out"), ids), logits(model["small"], ids))


def test_mtp_tensors_of_published_folders_are_left_out(folder: Path, tmp_path: Path) -> None:
    edit_tensors(folder, lambda t: t.update({"mtp.layers.0.norm.weight": torch.ones(32)}))
    slice_checkpoint(Checkpoint.open(folder), tmp_path / "out", "full")
    sliced = load_file(tmp_path / "out" / WEIGHTS)
    assert sliced.keys() == Checkpoint.open(folder).layout.stored.keys()


def test_digests_are_those_of_the_files(shards: Path) -> None:
    digests = Checkpoint.open(shards).space.digests
    assert digests.keys() == {path.name for path in shards.glob("*.safetensors")}


def test_a_declaration_is_replaced_and_the_weights_stay(folder: Path) -> None:
    opened = Checkpoint.open(folder)
    weights = (folder / WEIGHTS).read_bytes()
    quality = {"sum": {"nll": 1.5, "accuracy": 0.25}}
    sizes = [size.model_copy(update={"quality": quality}) for size in opened.space.submodels]
    declare(opened, opened.space.model_copy(update={"submodels": sizes, "digests": {}}))
    again = Checkpoint.open(folder)
    assert {size.name: size.quality for size in again.space.submodels} == {
        name: quality for name in opened.space.sizes
    }
    assert again.space.digests == opened.space.digests
    assert (folder / WEIGHTS).read_bytes() == weights
    assert "0.250" in (folder / "README.md").read_text()


def test_a_declaration_that_lies_is_never_written(folder: Path) -> None:
    opened = Checkpoint.open(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    sizes = [size.model_copy(update={"total_params": 7}) for size in opened.space.submodels]
    with pytest.raises(ValueError, match="total_params says 7"):
        declare(opened, opened.space.model_copy(update={"submodels": sizes}))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_unknown_size_lists_those_there_are(written: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no size 'huge'; there are full, small, prefix"):
        slice_checkpoint(Checkpoint.open(written), tmp_path / "out", "huge")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 40}, "hidden_size = 40 is larger than the parent's 32"),
        ({"head_dim": 4}, "head_dim is no axis"),
        ({"mamba_num_heads": 3}, "mamba_num_heads = 3 does not divide"),
    ],
)
def test_fields_that_cannot_be(
    written: Path, tmp_path: Path, fields: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        slice_checkpoint(Checkpoint.open(written), tmp_path / "out", fields=fields)
    assert not (tmp_path / "out").exists()


def test_name_and_fields_exclude_each_other(written: Path, tmp_path: Path) -> None:
    opened = Checkpoint.open(written)
    with pytest.raises(ValueError, match="either"):
        slice_checkpoint(opened, tmp_path / "out", "small", {"hidden_size": 8})
    with pytest.raises(ValueError, match="either"):
        slice_checkpoint(opened, tmp_path / "out")
