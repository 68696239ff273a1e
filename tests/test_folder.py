"""Folders appear whole or not at all."""

from pathlib import Path

import pytest
from models import elastic, tiny

from star_elastic import tensors
from star_elastic.checkpoint import Checkpoint
from star_elastic.folder import CheckpointError, atomic_folder
from star_elastic.layout import Layout
from star_elastic.slicing import slice_checkpoint


def test_a_failure_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    model = elastic("nemotron_h")
    state = model.state
    del state["model.norm_f.weight"]
    with pytest.raises(KeyError, match="norm_f"):
        tensors.write(tmp_path / "out", state, model.layout, model.space, max_shard_size=2_000)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_slice_leaves_nothing(shards: Path, tmp_path: Path) -> None:
    opened = Checkpoint.open(shards)
    sorted(shards.glob("*.safetensors"))[-1].unlink()
    (tmp_path / "here").mkdir()
    with pytest.raises(CheckpointError, match="no such file"):
        slice_checkpoint(opened, tmp_path / "here" / "out", "small", max_shard_size=2_000)
    assert list((tmp_path / "here").iterdir()) == []


def test_a_failure_while_overwriting_keeps_the_old(folder: Path) -> None:
    model = elastic("nemotron_h")
    state = model.state
    del state["model.norm_f.weight"]
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(KeyError, match="norm_f"):
        tensors.write(folder, state, model.layout, model.space, overwrite=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "out") as temporary:
        (temporary / "half").write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_nothing_shows_before_the_end(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "out") as temporary:
        (temporary / "a").write_text("a")
        assert not (tmp_path / "out").exists()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_existing_target_is_refused(folder: Path, written: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(FileExistsError, match=str(folder)):
        elastic("llama").save_pretrained(folder)
    with pytest.raises(FileExistsError, match=str(folder)):
        slice_checkpoint(Checkpoint.open(written), folder, "small")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_overwriting_replaces_all(folder: Path) -> None:
    (folder / "stale").write_text("stale")
    elastic("llama").save_pretrained(folder, overwrite=True)
    assert Checkpoint.open(folder).config.model_type == "llama"
    assert not (folder / "stale").exists()
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_slice_never_replaces_its_checkpoint(folder: Path) -> None:
    with pytest.raises(ValueError, match="the checkpoint itself"):
        slice_checkpoint(Checkpoint.open(folder), folder, "small", overwrite=True)
    assert Checkpoint.open(folder).is_elastic


def test_a_slice_never_replaces_its_checkpoint_by_another_path(folder: Path) -> None:
    (folder.parent / "link").symlink_to(folder)
    roundabout = folder.parent / "link" / ".." / folder.name
    for target in (folder.parent / "link", roundabout):
        with pytest.raises(ValueError, match="the checkpoint itself"):
            slice_checkpoint(Checkpoint.open(folder), target, "small", overwrite=True)
    assert Checkpoint.open(folder).is_elastic


def test_layout_of_a_plain_folder(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    opened = Checkpoint.open(tmp_path)
    assert not opened.is_elastic
    assert [*opened.space.sizes] == ["full"]
    assert opened.size("full").total_params == Layout(opened.config).count()
