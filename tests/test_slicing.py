"""Cutting files: bounded memory, one pass for several sizes, what is read and what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from folders import stock_load
from hypothesis import given, settings
from hypothesis import strategies as st
from models import FAMILIES, SMALL, elastic, letters_tokenizer, logits, same, token_ids
from safetensors.torch import load_file
from torch import Tensor

from bench.nano import nano_config
from star_elastic import configs, stock
from star_elastic.checkpoint import Checkpoint
from star_elastic.corner import Corner, corner_of, total, union, without
from star_elastic.folder import CheckpointError, Reader
from star_elastic.layout import Layout
from star_elastic.slicing import bytes_to_read, custom, plan, slice_all, slice_checkpoint
from star_elastic.transfer import transfer

runs = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9)), max_size=5).map(
    lambda found: tuple(union([found]))
)


def indices(found: Any) -> set[int]:
    return {index for start, length in found for index in range(start, start + length)}


def loaded(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder, by the safetensors package."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


@given(a=runs, b=runs)
def test_runs_are_sets(a: tuple[Any, ...], b: tuple[Any, ...]) -> None:
    assert indices(without(a, b)) == indices(a) - indices(b)
    assert indices(union([a, b])) == indices(a) | indices(b)
    assert total(union([a, b])) == len(indices(a) | indices(b))


@given(rows=runs, columns=runs, block=st.integers(1, 50))
@settings(deadline=None)
def test_a_corner_is_cut_and_put_back(
    rows: tuple[Any, ...], columns: tuple[Any, ...], block: int
) -> None:
    whole = np.random.default_rng(0).integers(0, 256, (50, 50)).astype(np.uint8)
    corner = Corner(50, rows, columns)
    cut = b"".join(
        part.tobytes()
        for start in range(0, 50, block)
        for part in corner.cut(whole[start : start + block], start)
    )
    expected = whole[np.ix_(sorted(indices(rows)), sorted(indices(columns)))]
    assert cut == expected.tobytes() and len(cut) == corner.bytes
    back = np.zeros_like(whole)
    corner.put(back, 0, np.frombuffer(cut, np.uint8))
    kept = np.zeros_like(whole)
    kept[np.ix_(sorted(indices(rows)), sorted(indices(columns)))] = expected
    assert (back == kept).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_all_sizes_in_one_pass_are_those_cut_by_torch(family: str, tmp_path: Path) -> None:
    elastic(family).save_pretrained(tmp_path / "e")
    opened = Checkpoint.open(tmp_path / "e")
    sizes = {
        tmp_path / "full": opened.size("full"),
        tmp_path / "small": opened.size("small"),
        tmp_path / "narrow": custom(opened, {"hidden_size": SMALL[family]["hidden_size"]}),
    }
    slice_all(opened, sizes)
    for folder, size in sizes.items():
        same(loaded(folder), dict(opened.tensors(opened.layout.sizes_of(size.config))))


@pytest.mark.parametrize("block", [1, 7, 64, 1000, 2**20])
def test_any_buffer_gives_the_same_bytes(written: Path, block: int) -> None:
    opened = Checkpoint.open(written)
    child = opened.layout.sizes_of(opened.size("small").config)
    expected = dict(opened.tensors(child))
    pieces = plan(opened, opened.size("small")).pieces
    if block < 64:  # byte by byte is slow: the tensors of one Mamba layer have every kind of cut
        mamba = next(name for name in pieces if name.endswith("in_proj.weight"))
        layer = mamba.partition("mixer")[0]
        pieces = {name: piece for name, piece in pieces.items() if name.startswith(layer)}
    found: dict[str, bytearray] = {name: bytearray() for name in pieces}
    wanted = {name: [(each.corner, found[name].extend)] for name, each in pieces.items()}
    with Reader(opened.path, opened.stored) as reader:
        transfer(reader, wanted, block=block)
    assert pieces
    for name, piece in pieces.items():
        assert bytes(found[name]) == expected[piece.name].numpy().tobytes(), name


def test_rows_and_experts_cost_what_they_keep(written: Path) -> None:
    opened = Checkpoint.open(written)
    experts = plan(opened, custom(opened, {"n_routed_experts": 3}))
    assert bytes_to_read([experts]) == experts.bytes
    small = plan(opened, opened.size("small"))
    assert small.bytes < bytes_to_read([small]) < opened.disk_bytes()
    full = plan(opened, opened.size("full"))
    assert bytes_to_read([full, small, experts]) == opened.disk_bytes()


def test_progress_adds_up(written: Path, tmp_path: Path) -> None:
    opened, heard = Checkpoint.open(written), []
    small = opened.size("small")
    slice_all(opened, {tmp_path / "out": small}, progress=heard.append)
    assert sum(heard) == bytes_to_read([plan(opened, small)])


def test_shards_of_a_slice_have_an_index(written: Path, tmp_path: Path) -> None:
    opened = Checkpoint.open(written)
    slice_checkpoint(opened, tmp_path / "one", "small")
    slice_checkpoint(opened, tmp_path / "many", "small", max_shard_size=3_000)
    assert len(list((tmp_path / "many").glob("model-*-of-*.safetensors"))) > 5
    same(loaded(tmp_path / "many"), loaded(tmp_path / "one"))
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == opened.disk_bytes(
        opened.layout.sizes_of(opened.size("small").config)
    )
    stock_load(tmp_path / "many")


def test_layers_that_differ_are_refused_by_name(tmp_path: Path) -> None:
    elastic("llama").save_pretrained(tmp_path / "e")
    opened = Checkpoint.open(tmp_path / "e")
    widths = [opened.layout.sizes["intermediate_size"], *[8] * (len(opened.layout.blocks) - 1)]
    with pytest.raises(ValueError, match="cannot express intermediate_size per layer"):
        slice_checkpoint(opened, tmp_path / "out", fields={"intermediate_size": widths})
    assert not (tmp_path / "out").exists()


def test_two_sizes_want_two_folders(written: Path, tmp_path: Path) -> None:
    opened = Checkpoint.open(written)
    one, same_place = tmp_path / "out", tmp_path / "x" / ".." / "out"
    with pytest.raises(ValueError, match="two sizes for one folder"):
        slice_all(opened, {one: opened.size("small"), same_place: opened.size("full")})


def test_a_folder_that_holds_the_checkpoint_is_never_replaced(folder: Path) -> None:
    before = sorted(folder.parent.rglob("*"))
    with pytest.raises(ValueError, match="holds the checkpoint itself"):
        slice_checkpoint(Checkpoint.open(folder), folder.parent, "small", overwrite=True)
    assert sorted(folder.parent.rglob("*")) == before


def test_a_disk_too_small_is_told_before_the_first_byte(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OSError, match=r"bytes are needed and 1,000 are free.*out"):
        slice_checkpoint(Checkpoint.open(written), tmp_path / "out", "small")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shorter", [True, False])
def test_a_parent_that_changes_is_noticed(folder: Path, tmp_path: Path, shorter: bool) -> None:
    opened = Checkpoint.open(folder)
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-8] if shorter else data[:8] + b" " + data[9:])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: (bad|changed)"):
        slice_checkpoint(opened, tmp_path / "out", "small")
    assert not (tmp_path / "out").exists()


def test_written_to_while_it_is_read(folder: Path, tmp_path: Path) -> None:
    opened = Checkpoint.open(folder)

    def meddle(count: int) -> None:
        with (folder / "model.safetensors").open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\0")

    with pytest.raises(CheckpointError, match="changed while it was read"):
        slice_all(opened, {tmp_path / "out": opened.size("small")}, progress=meddle)
    assert not (tmp_path / "out").exists()


def test_cutting_needs_no_torch_and_little_memory(tmp_path: Path) -> None:
    """A parent of 200 MB in one process without torch: its peak is far below the parent."""
    model = elastic("llama", hidden_size=1024, intermediate_size=4096, vocab_size=16384)
    model.tokenizer = letters_tokenizer()
    model.save_pretrained(tmp_path / "e")
    told = subprocess.run(
        [sys.executable, "-c", _PEAK, tmp_path / "e", tmp_path / "out"],
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(told.stdout)
    assert found["torch"] is False
    assert found["peak"] < 160 * 2**20 < found["parent"]
    same(loaded(tmp_path / "out"), dict(Checkpoint.open(tmp_path / "e").tensors(_half(tmp_path))))


def _half(tmp_path: Path) -> dict[str, Any]:
    layout = Checkpoint.open(tmp_path / "e").layout
    return layout.sizes_of({"hidden_size": 512, "intermediate_size": 2048})


_PEAK = """
import json, sys
from star_elastic.cli import main
from pathlib import Path
source, out = sys.argv[1:]
fields = ["--set", "hidden_size=512", "--set", "intermediate_size=2048"]
sys.argv = ["star-elastic", "slice", source, "--out", out, *fields]
stdout, sys.stdout = sys.stdout, sys.stderr
try:
    main()
except SystemExit as done:
    assert not done.code, done.code
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
parent = sum(path.stat().st_size for path in Path(source).glob("*.safetensors"))
told = {"torch": sys.modules.get("torch") is not None, "peak": int(peak.split()[1]) * 1024}
print(json.dumps(told | {"parent": parent}), file=stdout)
"""


@pytest.mark.parametrize("family", ["nemotron_h", "qwen3_moe"])
def test_a_slice_in_stock_transformers_has_the_logits_of_the_view(
    family: str, tmp_path: Path
) -> None:
    model = elastic(family)
    model.save_pretrained(tmp_path / "e")
    slice_checkpoint(Checkpoint.open(tmp_path / "e"), tmp_path / "small", "small")
    ids = token_ids()
    assert torch.equal(logits(stock_load(tmp_path / "small"), ids), logits(model["small"], ids))


def test_corners_of_a_grouped_head_cut(written: Path) -> None:
    """Heads go within their group: several runs of rows, never a prefix."""
    opened = Checkpoint.open(written)
    name = "backbone.layers.0.mixer.out_proj.weight"
    child = opened.layout.sizes_of(SMALL["nemotron_h"])
    corner = corner_of(opened.weights[name], 4, opened.layout.sizes, child)
    assert len(corner.columns) > 1
    assert corner.bytes == 4 * np.prod(opened.weights[name].shape(child))


def test_the_12b_is_a_stock_model_at_full_size() -> None:
    """Nemotron 3 Nano's 52 layers at hidden 1920 and expert width 960, on `meta`."""
    layout = Layout(nano_config())
    fields = {"hidden_size": 1920, "moe_intermediate_size": 960}
    model = stock.build(configs.child_config(layout, fields), device="meta")
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    child = layout.sizes_of(fields)
    assert shapes == {
        name: weight.shape(child) for name, weight in layout.kept(child, layout.weights)
    }
    assert sum(p.numel() for p in model.parameters()) == 12_426_655_424
