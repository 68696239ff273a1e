"""Nested checkpoints made elsewhere: sizes declared on them, their weights where they are."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fake_hub import FakeHub
from folders import WEIGHTS, edit_json
from models import ORDER
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from bench.nano import write_parent
from star_elastic import adopt as adoption
from star_elastic.checkpoint import Checkpoint
from star_elastic.cli.adopt import adopt
from star_elastic.cli.inspect import inspect
from star_elastic.folder import CheckpointError, digest
from star_elastic.slicing import slice_checkpoint

SMALL = "small:hidden_size=24,moe_intermediate_size=8"
FIELDS = {"hidden_size": 24, "moe_intermediate_size": 8}
THEIRS = "---\nlicense: other\n---\n# A nested checkpoint\n"
NVIDIA = "NVIDIA-Nemotron-Labs-3-Elastic-30B-A3B"


@pytest.fixture
def nested(written: Path, tmp_path: Path) -> Path:
    """A folder as another's tools leave it: no declaration, keys in an order of their own."""
    folder = tmp_path / "nested"
    shutil.copytree(written, folder)
    edit_json(folder / "config.json", lambda values: values.pop("elastic_config"))
    values = json.loads((folder / "config.json").read_text())
    turned = dict(reversed(values.items())) | {"zeta": {"b": 1, "a": [2]}, "alpha": float("inf")}
    turned["auto_map"] = {"AutoConfig": "configuration_nested.NestedConfig"}
    (folder / "config.json").write_text(json.dumps(turned))
    (folder / "README.md").write_text(THEIRS)
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub() as running:
        yield running


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_in_place_only_the_declaration_is_added(nested: Path) -> None:
    before = files(nested)
    adopt(str(nested), [SMALL])
    after = files(nested)
    old, new = (json.loads(each["config.json"]) for each in (before, after))
    declared = new.pop("elastic_config")
    assert list(new.items()) == list(old.items())
    assert {**after, "config.json": b""} == {**before, "config.json": b""}  # their card, too
    assert declared["training"] == {"recipe": "adopted from nested", "steps": None, "tokens": None}
    assert declared["digests"] == {WEIGHTS: digest(nested / WEIGHTS)}
    sizes = Checkpoint.open(nested).space.submodels
    assert [(each.name, each.config, each.trained) for each in sizes] == [
        ("full", {}, True),
        ("small", FIELDS, True),
    ]


def test_a_card_is_written_where_there_is_none(nested: Path, tmp_path: Path) -> None:
    (nested / "README.md").unlink()
    adopt(str(nested), [SMALL], digests=False)
    assert "declared by adopt, not trained by star-elastic: adopted from nested" in (
        (nested / "README.md").read_text()
    )
    assert not Checkpoint.open(nested).space.digests
    slice_checkpoint(Checkpoint.open(nested), tmp_path / "cut", "small")
    assert "declared by adopt" in (tmp_path / "cut/README.md").read_text()
    adopt(str(nested), ["other:hidden_size=16"], replace=True)
    assert "| other |" in (nested / "README.md").read_text()  # ours is written anew


def test_a_new_folder_of_hard_links(nested: Path, tmp_path: Path) -> None:
    before = files(nested)
    out = tmp_path / "out"
    adopt(str(nested), [SMALL], out=out)
    assert files(nested) == before
    assert (out / WEIGHTS).samefile(nested / WEIGHTS) and not (out / WEIGHTS).is_symlink()
    config = json.loads((out / "config.json").read_text())
    assert "auto_map" not in config  # the code it names is not there
    assert config["zeta"] == {"b": 1, "a": [2]} and list(config)[-1] == "elastic_config"
    assert (out / "tokenizer_config.json").is_file()
    assert "declared by adopt" in (out / "README.md").read_text()
    for folder, how in ((out, {"size": "small"}), (nested, {"fields": FIELDS})):
        slice_checkpoint(Checkpoint.open(folder), tmp_path / f"from-{folder.name}", **how)
    cut = tmp_path / "from-out" / WEIGHTS
    assert cut.read_bytes() == (tmp_path / "from-nested" / WEIGHTS).read_bytes()


def test_a_folder_that_exists_is_not_written(nested: Path, written: Path, tmp_path: Path) -> None:
    before = files(written)
    with pytest.raises(FileExistsError, match="exists already"):
        adopt(str(nested), [SMALL], out=written)
    assert files(written) == before


def test_shards_are_linked_with_their_index(sharded: Path, tmp_path: Path) -> None:
    adopt(str(sharded), [SMALL], out=tmp_path / "out", replace=True)
    there = {path.name for path in sharded.glob("*.safetensors*")}
    assert len(there) > 3 and there == {path.name for path in (tmp_path / "out").glob("model*")}
    assert len(Checkpoint.open(tmp_path / "out").space.digests) == len(there) - 1


def test_nothing_is_copied_where_no_hard_link_can_be(nested: Path) -> None:
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == nested.stat().st_dev:
        pytest.skip("one file system only")
    out = other / f"star-elastic-{os.getpid()}" / "out"
    try:
        with pytest.raises(OSError, match="no hard link to .* and nothing is copied"):
            adopt(str(nested), [SMALL], out=out)
        assert not list(out.parent.iterdir())
    finally:
        shutil.rmtree(out.parent)


def test_the_cache_of_the_hub_stays_as_it_is(hub: FakeHub, nested: Path, tmp_path: Path) -> None:
    hub.push("maker/nested", nested)
    words = ["-m", "star_elastic", "adopt", "maker/nested", "--size", SMALL]
    done = hub.python(tmp_path, *words)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "wants --out DIR" in done.stderr.splitlines()[-1]
    assert not hub.asked  # it did not download first what it would refuse then
    words += ["--out", tmp_path / "out"]
    done = hub.python(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(tmp_path / "out")
    (snapshot,) = (tmp_path / "huggingface/hub").glob("models--*/snapshots/*")
    with pytest.raises(CheckpointError, match="say --out DIR"):
        adopt(str(snapshot), [SMALL])
    before = files(snapshot)
    done = hub.python(tmp_path, *words, offline=True)
    assert done.returncode == 0, done.stderr
    assert files(snapshot) == before and "elastic_config" not in before["config.json"].decode()
    assert (tmp_path / "out" / WEIGHTS).samefile(snapshot / WEIGHTS)
    assert "digests" not in done.stderr  # the hub's name of the blob is its digest, checked before
    space = Checkpoint.open(tmp_path / "out").space
    assert space.digests == {WEIGHTS: digest(nested / WEIGHTS)}
    assert space.training is not None and space.training.recipe == "adopted from maker/nested"


def test_a_size_within_a_budget_lies_between_and_nobody_trained_it(nested: Path) -> None:
    opened = Checkpoint.open(nested)
    low, high = (opened.layout.count(opened.layout.sizes_of(f)) for f in (FIELDS, {}))
    budget = (low + high) // 2
    adopt(str(nested), [SMALL], [f"middle:params={budget}"], align="4", digests=False)
    space = Checkpoint.open(nested).space
    middle = space.sizes["middle"]
    assert low < middle.total_params <= budget and not middle.trained
    assert {n % 4 for n in middle.config.values() if isinstance(n, int)} == {0}
    assert space.axes["hidden_size"].multiple_of == 4
    assert [each.trained for each in space.submodels] == [True, True, False]


REFUSED = [
    ([], [], "nested: no sizes are known of it"),
    (["s:vocab_size=8"], [], "size s: vocab_size is no axis"),
    (["s:hidden_size=33"], [], "size s: hidden_size = 33 is larger than the parent's 32"),
    (["s:hidden_size=0"], [], "size s: hidden_size = 0 is not a positive integer"),
    (["s:hidden_size=x"], [], "--size s: hidden_size=x: not of the form field=number"),
    (["s:hidden_size=8,hidden_size=9"], [], "--size s: hidden_size: said twice"),
    (["s:hidden_size=8", "s:hidden_size=16"], [], "--size s: said twice"),
    (["s:num_hidden_layers=3"], [], "size s: num_hidden_layers: this model has no layer_order"),
    (["a b:hidden_size=8"], [], "size 'a b': String should match pattern"),
    ([SMALL], ["m:memory=3"], "--budget m:memory=3: not of the form"),
    ([SMALL], ["m:params=lots"], "--budget m:params lots: not a number of parameters"),
    ([SMALL], ["small:params=9k"], "--budget small: there is a size of this name"),
    ([SMALL], ["m:params=9"], "even the smallest size takes"),
    ([SMALL], ["m:params=9B"], "--budget m: that is the size full"),
]


@pytest.mark.parametrize(("sizes", "budgets", "complaint"), REFUSED)
def test_refusals(nested: Path, sizes: list[str], budgets: list[str], complaint: str) -> None:
    before = files(nested)
    with pytest.raises(ValueError) as error:
        adopt(str(nested), sizes, budgets, digests=False)
    assert complaint in str(error.value) and "\n" not in str(error.value)
    assert files(nested) == before


def test_a_declaration_is_replaced_only_when_told(written: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(written, tmp_path / "elastic")
    with pytest.raises(CheckpointError, match=r"already \(full, small, prefix\): say --replace"):
        adopt(str(folder), [SMALL])
    adopt(str(folder), [SMALL], replace=True)
    space = Checkpoint.open(folder).space
    assert [*space.sizes] == ["full", "small"] and space.layer_order is None


def test_depth_with_a_layer_order(nested: Path, tmp_path: Path) -> None:
    order = tmp_path / "order.json"
    order.write_text(json.dumps(ORDER["nemotron_h"]))
    adopt(str(nested), ["short:num_hidden_layers=4"], layer_order=order, digests=False)
    opened = Checkpoint.open(nested)
    assert opened.space.layer_order == ORDER["nemotron_h"]
    slice_checkpoint(opened, tmp_path / "short", "short")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "short").config.num_hidden_layers == 4


@pytest.mark.parametrize("text", ["{}", "[0, 1.5]", "[0,", "[0, 1]"])
def test_no_layer_order(nested: Path, tmp_path: Path, text: str) -> None:
    order = tmp_path / "order.json"
    order.write_text(text)
    with pytest.raises(ValueError, match="not a JSON list of layers|not an order of 6 layers"):
        adopt(str(nested), [SMALL], layer_order=order, digests=False)


def in_fp8(folder: Path) -> None:
    """Quantize a folder as ModelOpt does: codes, one scale a tensor, one for its inputs."""
    state: dict[str, Tensor] = {}
    for name, tensor in load_file(folder / WEIGHTS).items():
        module = name.removesuffix(".weight")
        if tensor.ndim != 2 or not module.endswith("_proj"):
            state[name] = tensor
            continue
        scale = tensor.abs().max() / 448
        state[name] = (tensor / scale).to(torch.float8_e4m3fn)
        state |= {f"{module}.weight_scale": scale, f"{module}.input_scale": scale / 3}
        if module.endswith((".k_proj", ".v_proj")):
            state[f"{module}.{module[-6]}_scale"] = torch.tensor(0.5)
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    excluded = ["lm_head", "backbone.layers.0.mixer.conv1d"]
    quantization = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": excluded}
    declared = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": excluded}
    edit_json(folder / "config.json", lambda values: values.update(quantization_config=declared))
    told = {"producer": {"name": "modelopt"}, "quantization": quantization}
    (folder / "hf_quant_config.json").write_text(json.dumps(told))


def in_nvfp4(folder: Path) -> None:
    """The shapes of NVFP4: two codes a byte, one scale for 16 inputs, one for the tensor."""
    state: dict[str, Tensor] = {}
    for name, tensor in load_file(folder / WEIGHTS).items():
        module = name.removesuffix(".weight")
        if not module.endswith((".mixer.out_proj", ".up_proj")):
            state[name] = tensor
            continue
        rows, columns = tensor.shape
        state[name] = torch.randint(256, (rows, columns // 2), dtype=torch.uint8)
        state[f"{module}.weight_scale"] = torch.rand(rows, columns // 16).to(torch.float8_e4m3fn)
        state[f"{module}.weight_scale_2"] = torch.tensor(0.25)
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "NVFP4"}}')


def test_an_fp8_checkpoint_is_adopted_and_cut(nested: Path, tmp_path: Path) -> None:
    in_fp8(nested)
    out = tmp_path / "out"
    adopt(str(nested), [SMALL], out=out)
    opened = Checkpoint.open(out)
    assert opened.is_quantized and opened.space.sizes["small"].trained
    slice_checkpoint(opened, tmp_path / "cut", "small")
    parent, child = load_file(nested / WEIGHTS), load_file(tmp_path / "cut" / WEIGHTS)
    assert child.keys() == parent.keys()
    codes = [name for name, tensor in child.items() if tensor.dtype == torch.float8_e4m3fn]
    smaller = [name for name in codes if child[name].shape != parent[name].shape]
    assert len(codes) > 20 and len(smaller) > 20
    for name in codes:
        rows, columns = child[name].shape
        prefix = parent[name][:rows, :columns]
        assert torch.equal(child[name].view(torch.uint8), prefix.view(torch.uint8)), name
    scales = [name for name in child if name.endswith("_scale")]
    assert len(scales) >= 2 * len(codes) + 2
    assert all(torch.equal(child[name], parent[name]) for name in scales)
    config = json.loads((tmp_path / "cut/config.json").read_text())
    assert config["quantization_config"]["quant_algo"] == "FP8" and config["hidden_size"] == 24
    assert (tmp_path / "cut/hf_quant_config.json").is_file()


def test_blocks_of_codes_are_not_cut_in_two(nested: Path) -> None:
    in_nvfp4(nested)
    with pytest.raises(ValueError, match="hidden_size = 24 is not a multiple of 16"):
        adopt(str(nested), [SMALL], digests=False)
    # two heads of four channels stay in each group: half a block
    with pytest.raises(ValueError, match=r"size s: .*out_proj.*do not fill blocks of 16"):
        adopt(str(nested), ["s:mamba_num_heads=4"], digests=False)
    adopt(str(nested), ["s:hidden_size=16"], digests=False)
    assert Checkpoint.open(nested).space.axes["hidden_size"].multiple_of == 16


def at_full_size(folder: Path) -> None:
    """NVIDIA's shapes, and weights that are one hole."""
    write_parent(folder, sparse=True)
    edit_json(folder / "config.json", lambda values: values.pop("elastic_config"))


def test_nvidias_checkpoint_works_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / f"{NVIDIA}-BF16"
    at_full_size(folder)
    adopt(str(folder), digests=False)
    table, said = capsys.readouterr()
    assert "12b" in table and "the widths of its 23B size are not published" in said
    inspect(str(folder), json=True)
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["30b"]["total_params"] == 31_577_937_344
    assert rows["12b"]["total_params"] == 12_426_655_424
    assert rows["12b"]["active_params"] == 2_082_617_024
    assert all(row["trained"] for row in rows.values())
    budgets = ["23b:params=23.6B", "a:active=2.8B"]
    adopt(str(folder), None, budgets, align="64", digests=False, replace=True)
    said = capsys.readouterr().err
    assert "23b: between trained sizes" in said and "not published" not in said
    sizes = Checkpoint.open(folder).space.sizes
    assert 23.2e9 < sizes["23b"].total_params <= 23.6e9
    assert 2.7e9 < sizes["a"].active_params <= 2.8e9
    assert not sizes["23b"].trained and sizes["12b"].trained


def test_the_plain_model_of_the_same_config_is_not_taken_for_it(tmp_path: Path) -> None:
    folder = tmp_path / "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16"
    at_full_size(folder)
    with pytest.raises(ValueError, match="no sizes are known of it.*others have the same config"):
        adopt(str(folder), digests=False)


def test_the_name_alone_is_not_enough(nested: Path) -> None:
    named = nested.rename(nested.with_name(f"{NVIDIA}-FP8"))
    assert adoption.published(Checkpoint.open(named)) is None


def test_the_command_line(nested: Path, tmp_path: Path) -> None:
    hub = FakeHub()  # only for its way to run a process
    words = ["-m", "star_elastic", "adopt", nested, "--size", SMALL, "--json"]
    done = hub.python(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    assert [row["name"] for row in json.loads(done.stdout)] == ["full", "small"]
    assert "declared by adopt" in done.stderr
