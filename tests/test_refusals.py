"""Folders that lie: one line that names the file, and the tensor or field (docs/format.md, 4)."""

import contextlib
import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import (
    EMBEDDINGS,
    INDEX,
    WEIGHTS,
    edit_elastic,
    edit_header,
    edit_json,
    edit_tensors,
    refused,
)
from safetensors.torch import load_file, save_file

from star_elastic.checkpoint import Checkpoint
from star_elastic.folder import CheckpointError
from star_elastic.model import ElasticModel
from star_elastic.slicing import slice_checkpoint


def test_missing_tensor(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop(EMBEDDINGS))
    refused(folder, folder.name, EMBEDDINGS, "missing")


def test_extra_tensor(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update(spare=torch.ones(1)))
    refused(folder, WEIGHTS, "spare")


def test_wrong_shape(folder: Path) -> None:
    edit_tensors(folder, lambda t: t.update({EMBEDDINGS: t[EMBEDDINGS][:, :8].clone()}))
    refused(folder, WEIGHTS, EMBEDDINGS, "(64, 8)", "(64, 32)")


def test_transposed_shape(folder: Path) -> None:
    edit_tensors(folder, lambda t: t.update({EMBEDDINGS: t[EMBEDDINGS].T.contiguous()}))
    refused(folder, WEIGHTS, EMBEDDINGS, "(32, 64)")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int8])
def test_wrong_dtype(folder: Path, dtype: torch.dtype) -> None:
    edit_tensors(folder, lambda t: t.update({EMBEDDINGS: t[EMBEDDINGS].to(dtype)}))
    refused(folder, WEIGHTS, EMBEDDINGS, "dtype")


def test_axis_the_family_does_not_have(folder: Path) -> None:
    edit_elastic(folder, lambda e: e["axes"].update(head_dim={"choices": [4], "multiple_of": 1}))
    refused(folder, "config.json", "head_dim", "no axis")


def test_choice_larger_than_the_parent(folder: Path) -> None:
    edit_elastic(folder, lambda e: e["axes"]["hidden_size"]["choices"].append(64))
    refused(folder, "config.json", "hidden_size = 64", "larger")


def test_choice_that_breaks_a_group(folder: Path) -> None:
    edit_elastic(folder, lambda e: e["axes"]["mamba_num_heads"]["choices"].append(3))
    refused(folder, "config.json", "mamba_num_heads = 3", "n_groups")


def test_choice_that_breaks_an_alignment(folder: Path) -> None:
    edit_elastic(folder, lambda e: e["axes"]["hidden_size"].update(multiple_of=16))
    refused(folder, "config.json", "hidden_size = 24", "multiple of 16")


@pytest.mark.parametrize("choice", [0, -8, True, 8.0, "8", None])
def test_choice_that_is_no_positive_integer(folder: Path, choice: Any) -> None:
    edit_elastic(folder, lambda e: e["axes"]["hidden_size"]["choices"].append(choice))
    refused(folder, "config.json", "hidden_size")


def test_submodel_off_the_choices(folder: Path) -> None:
    edit_elastic(folder, lambda e: e["submodels"][1]["config"].update(hidden_size=8))
    refused(folder, "config.json", "small", "hidden_size = 8")


def test_submodel_with_an_undeclared_axis(folder: Path) -> None:
    edit_elastic(folder, lambda e: e["axes"].pop("hidden_size"))
    refused(folder, "config.json", "small", "hidden_size")


def test_submodel_with_fewer_experts_than_a_token_uses(folder: Path) -> None:
    def change(declared: dict[str, Any]) -> None:
        declared["axes"]["n_routed_experts"]["choices"].append(1)
        declared["submodels"][1]["config"].update(n_routed_experts=1, num_experts_per_tok=2)

    edit_elastic(folder, change)
    refused(folder, "config.json", "n_routed_experts = 1", "num_experts_per_tok = 2")


@pytest.mark.parametrize("count", ["total_params", "active_params"])
def test_counts_that_lie(folder: Path, count: str) -> None:
    honest = json.loads((folder / "config.json").read_text())["elastic_config"]["submodels"][1]
    edit_elastic(folder, lambda e: e["submodels"][1].update({count: honest[count] - 1}))
    refused(folder, "config.json", "small", count, str(honest[count]), str(honest[count] - 1))


def test_two_sizes_of_one_name(folder: Path) -> None:
    edit_elastic(folder, lambda e: e["submodels"][1].update(name="full"))
    refused(folder, "config.json", "submodels")


@pytest.mark.parametrize("name", ["", "../out", "a/b", ".hidden", "x" * 65, "a\nb"])
def test_size_name_that_is_no_name(folder: Path, name: str) -> None:
    edit_elastic(folder, lambda e: e["submodels"][1].update(name=name))
    refused(folder, "config.json", "submodels.1.name")


@pytest.mark.parametrize("version", [2, 0, "1", None])
def test_unknown_format_version(folder: Path, version: Any) -> None:
    edit_elastic(folder, lambda e: e.update(format_version=version))
    refused(folder, "config.json", "format_version")


def test_no_format_version(folder: Path) -> None:
    edit_elastic(folder, lambda e: e.pop("format_version"))
    refused(folder, "config.json", "format_version")


@pytest.mark.parametrize("where", [(), ("axes", "hidden_size"), ("submodels", 1)])
def test_unknown_key(folder: Path, where: tuple[Any, ...]) -> None:
    def change(declared: Any) -> None:
        for step in where:
            declared = declared[step]
        declared["router"] = "linear"

    edit_elastic(folder, change)
    refused(folder, "config.json", "router")


@pytest.mark.parametrize("declared", [[], "elastic", 1, {}])
def test_elastic_config_of_another_kind(folder: Path, declared: Any) -> None:
    edit_json(folder / "config.json", lambda config: config.update(elastic_config=declared))
    refused(folder, "config.json", "elastic_config")


def test_duplicate_json_key(folder: Path) -> None:
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.rstrip().rstrip("}") + ', "hidden_size": 16}')
    refused(folder, "config.json", "hidden_size")


def test_json_that_is_none(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    refused(folder, "config.json")


def test_json_that_is_no_object(folder: Path) -> None:
    (folder / "config.json").write_text("[]")
    refused(folder, "config.json", "object")


def test_json_of_great_depth(folder: Path) -> None:
    (folder / "config.json").write_text("[" * 100_000)
    refused(folder, "config.json")


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    refused(folder, "config.json")


def test_unknown_model_type(folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config.update(model_type="gpt2"))
    refused(folder, "config.json", "gpt2")


def test_broken_digest(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (folder / WEIGHTS).write_bytes(data)
    refused(folder, WEIGHTS, "digest")
    assert Checkpoint.open(folder, check_digests=False).is_elastic


@pytest.mark.parametrize(
    "file", ["lost.safetensors", "../elastic/model.safetensors", "/etc/passwd"]
)
def test_digest_of_a_file_that_is_not_here(folder: Path, file: str) -> None:
    edit_elastic(folder, lambda e: e["digests"].update({file: "sha256:0"}))
    refused(folder, "config.json", "digests", file)


def test_truncated_file(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])
    refused(folder, WEIGHTS)


@pytest.mark.parametrize("size", [0, 4, 8, 40])
def test_file_cut_inside_its_header(folder: Path, size: int) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:size])
    refused(folder, WEIGHTS, "header")


def test_data_behind_the_last_tensor(folder: Path) -> None:
    with (folder / WEIGHTS).open("ab") as file:
        file.write(b"more")
    refused(folder, WEIGHTS, "byte")


def first_two(header: dict[str, Any]) -> tuple[str, str]:
    """The two tensors whose data come first."""
    names = [name for name in header if name != "__metadata__"]
    first, second = sorted(names, key=lambda name: header[name]["data_offsets"])[:2]
    return first, second


def test_header_hole(folder: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        first, _ = first_two(header)
        for name, entry in header.items():
            if name not in ("__metadata__", first):
                entry["data_offsets"] = [offset + 4 for offset in entry["data_offsets"]]

    edit_header(folder, change)
    with (folder / WEIGHTS).open("ab") as file:
        file.write(bytes(4))
    refused(folder, WEIGHTS, "hole")


def test_header_overlap(folder: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        _, second = first_two(header)
        header[second]["data_offsets"] = [each - 4 for each in header[second]["data_offsets"]]

    edit_header(folder, change)
    refused(folder, WEIGHTS, "overlap")


@pytest.mark.parametrize(
    "entry",
    [
        {},
        {"dtype": "F32", "shape": [64, -32], "data_offsets": [0, 8192]},
        {"dtype": "F32", "shape": [64, 32.0], "data_offsets": [0, 8192]},
        {"dtype": "F32", "shape": "64", "data_offsets": [0, 8192]},
        {"dtype": "F32", "shape": [64, 32], "data_offsets": [0, "8192"]},
        {"dtype": "F32", "shape": [64, 32], "data_offsets": [8192]},
        {"dtype": 32, "shape": [64, 32], "data_offsets": [0, 8192]},
        [1],
    ],
)
def test_malformed_header_entry(folder: Path, entry: Any) -> None:
    edit_header(folder, lambda header: header.update({EMBEDDINGS: entry}))
    refused(folder, WEIGHTS, EMBEDDINGS)


def test_header_whose_bytes_are_not_those_of_its_shape(folder: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        first, second = first_two(header)
        header[first]["data_offsets"][1] -= 4  # four bytes change hands: still no hole
        header[second]["data_offsets"][0] -= 4

    edit_header(folder, change)
    refused(folder, WEIGHTS)


def test_duplicate_tensor_in_a_header(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = data[8 : 8 + length].decode().rstrip()[:-1]
    text = (header + f', "{EMBEDDINGS}": {{}}}}').encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    refused(folder, WEIGHTS, EMBEDDINGS)


@pytest.mark.parametrize(
    "file", ["../stolen.safetensors", "/tmp/x.safetensors", "sub/x.safetensors"]
)
def test_index_pointing_outside(shards: Path, file: str) -> None:
    edit_json(shards / INDEX, lambda index: index["weight_map"].update({EMBEDDINGS: file}))
    refused(shards, INDEX, EMBEDDINGS, file)


def test_index_naming_another_kind_of_file(shards: Path) -> None:
    edit_json(shards / INDEX, lambda i: i["weight_map"].update({EMBEDDINGS: "model.bin"}))
    refused(shards, INDEX, EMBEDDINGS, "model.bin")


def test_index_naming_a_tensor_that_is_not_there(shards: Path) -> None:
    def change(index: dict[str, Any]) -> None:
        index["weight_map"]["spare"] = index["weight_map"][EMBEDDINGS]

    edit_json(shards / INDEX, change)
    refused(shards, INDEX, "spare")


def test_index_that_omits_a_tensor(shards: Path) -> None:
    edit_json(shards / INDEX, lambda index: index["weight_map"].pop(EMBEDDINGS))
    refused(shards, INDEX, EMBEDDINGS)


def test_index_that_misplaces_a_tensor(shards: Path) -> None:
    def change(index: dict[str, Any]) -> None:
        places = index["weight_map"]
        places[EMBEDDINGS] = next(f for f in places.values() if f != places[EMBEDDINGS])

    edit_json(shards / INDEX, change)
    refused(shards, INDEX, EMBEDDINGS)


@pytest.mark.parametrize("weight_map", [None, [], {"a": 1}])
def test_index_of_another_kind(shards: Path, weight_map: Any) -> None:
    edit_json(shards / INDEX, lambda index: index.update(weight_map=weight_map))
    refused(shards, INDEX, "weight_map")


def test_shard_missing(shards: Path) -> None:
    lost = sorted(shards.glob("*.safetensors"))[1]
    lost.unlink()
    refused(shards, lost.name)


def test_one_tensor_in_two_shards(shards: Path) -> None:
    index = json.loads((shards / INDEX).read_text())
    home = index["weight_map"][EMBEDDINGS]
    other = next(file for file in index["weight_map"].values() if file != home)
    tensors = load_file(shards / other) | {EMBEDDINGS: load_file(shards / home)[EMBEDDINGS]}
    save_file(tensors, shards / other, metadata={"format": "pt"})
    refused(shards, EMBEDDINGS, home, other)


def test_pickled_weights_only(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    refused(folder, folder.name, WEIGHTS, "safetensors")


def test_neither_folder_nor_repository(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "nowhere", "neither a folder nor")


CANARY = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\n"


def plant_canary(folder: Path) -> None:
    (folder / "canary.py").write_text(CANARY + "class Canary: pass\n")


def test_code_of_a_folder_is_never_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Published folders of known families carry `auto_map`: they load, with the stock class."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    plant_canary(folder)
    names = {"AutoConfig": "canary.Canary", "AutoModelForCausalLM": "canary.Canary"}
    edit_json(folder / "config.json", lambda config: config.update(auto_map=names))
    model = ElasticModel.from_pretrained(folder)
    assert type(model.parent).__module__.startswith("transformers.")
    assert not list(folder.rglob("ran")) and not cached_canaries()


def test_code_of_an_unknown_family_is_never_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    plant_canary(folder)
    values = {"auto_map": {"AutoConfig": "canary.Canary"}, "model_type": "canary"}
    edit_json(folder / "config.json", lambda config: config.update(values))
    refused(folder, "config.json")
    assert not list(folder.rglob("ran")) and not cached_canaries()


def test_code_of_a_tokenizer_is_never_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    plant_canary(folder)
    auto_map = {"AutoTokenizer": ["canary.Canary", None]}
    values = {"tokenizer_class": "Canary", "auto_map": auto_map}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    with contextlib.suppress(Exception):
        ElasticModel.from_pretrained(folder)
    assert not list(folder.rglob("ran")) and not cached_canaries()


def test_a_tokenizer_that_cannot_be_loaded_is_named(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("[")
    with pytest.raises(CheckpointError, match="elastic/tokenizer_config.json: "):
        ElasticModel.from_pretrained(folder)


def cached_canaries() -> list[Path]:
    """Where transformers copies a folder's code before it runs it."""
    cache = Path(os.environ["HF_MODULES_CACHE"])
    return [*cache.rglob("canary.py"), *cache.rglob("ran")]


def test_a_slice_carries_no_code_of_its_parent(folder: Path, tmp_path: Path) -> None:
    plant_canary(folder)
    names = {"AutoModelForCausalLM": "canary.Canary"}
    edit_json(folder / "config.json", lambda config: config.update(auto_map=names))
    slice_checkpoint(Checkpoint.open(folder), tmp_path / "out", "small")
    assert not list((tmp_path / "out").glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
