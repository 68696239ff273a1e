"""Names that are taken, in each other's way, or the source's own: nothing is lost."""

import shutil
from pathlib import Path

import pytest
from crash import state, survey
from models import letters_tokenizer

from star_elastic.checkpoint import Checkpoint
from star_elastic.folder import atomic_folder
from star_elastic.slicing import slice_all, slice_checkpoint


@pytest.fixture
def parent(sharded: Path, tmp_path: Path) -> Path:
    """A folder that holds an elastic folder of several files, and nothing else."""
    shutil.copytree(sharded, tmp_path / "here" / "elastic")
    letters_tokenizer().save_pretrained(tmp_path / "here" / "elastic")
    return tmp_path / "here"


def test_of_two_targets_none_is_left_when_one_fails(parent: Path) -> None:
    opened, before = Checkpoint.open(parent / "elastic"), survey(parent)

    def fail(_: int) -> None:
        raise KeyboardInterrupt

    targets = {parent / "a": opened.size("small"), parent / "b": opened.size("prefix")}
    with pytest.raises(KeyboardInterrupt):
        slice_all(opened, targets, progress=fail)
    assert survey(parent) == before


@pytest.mark.parametrize("taken", ["a", "b"])
def test_of_two_targets_each_is_whole_or_absent(parent: Path, taken: str) -> None:
    """One name is taken while the slices are cut."""
    opened = Checkpoint.open(parent / "elastic")
    sizes = {"a": opened.size("small"), "b": opened.size("prefix")}
    for name, size in sizes.items():
        slice_all(opened, {parent / name: size})
    whole = survey(parent)
    for name in sizes:
        shutil.rmtree(parent / name)

    def take(_: int) -> None:
        (parent / taken).mkdir(exist_ok=True)

    with pytest.raises(FileExistsError, match=str(parent / taken)):
        slice_all(opened, {parent / name: size for name, size in sizes.items()}, progress=take)
    found = survey(parent)
    assert found.pop(taken) == {}
    assert all(found[name] == whole[name] for name in found)


def test_what_is_no_folder_of_ours_stays(tmp_path: Path) -> None:
    (tmp_path / ".out.partial").write_text("mine")
    with pytest.raises(NotADirectoryError), atomic_folder(tmp_path / "out"):
        pass
    assert (tmp_path / ".out.partial").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]


def test_a_folder_that_somebody_swapped_is_not_shown(tmp_path: Path) -> None:
    """Nor removed: whoever took the hidden one for a leftover may be writing there."""
    with (
        pytest.raises(FileNotFoundError, match="removed by somebody"),
        atomic_folder(tmp_path / "out") as temporary,
    ):
        temporary.rename(tmp_path / "elsewhere")
        temporary.mkdir()
        (temporary / "theirs").write_text("theirs")
    assert survey(tmp_path) == {".out.partial": {"theirs": b"theirs"}, "elsewhere": {}}


@pytest.mark.parametrize("name", [".out.partial", ".out.old", "out/inside"])
def test_a_source_that_the_writer_would_remove(parent: Path, name: str) -> None:
    """The hidden names are the writer's own, and a folder that is replaced goes as a whole."""
    (parent / name).parent.mkdir(exist_ok=True)
    source = (parent / "elastic").rename(parent / name)
    before = state(source)
    with pytest.raises(ValueError, match="the checkpoint itself"):
        slice_checkpoint(Checkpoint.open(source), parent / "out", "small", overwrite=True)
    assert state(source) == before


def test_a_source_behind_the_links_of_a_hub_cache(parent: Path) -> None:
    blobs, snapshot = parent / "blobs", parent / "snapshots" / "1"
    (parent / "elastic").rename(blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(path)
    before = state(blobs)
    opened = Checkpoint.open(snapshot)
    with pytest.raises(ValueError, match=f"{blobs} holds the checkpoint itself"):
        slice_checkpoint(opened, blobs, "small", overwrite=True)
    assert state(blobs) == before


def test_targets_that_are_in_each_others_way(parent: Path) -> None:
    opened, before = Checkpoint.open(parent / "elastic"), survey(parent)
    one, two = opened.size("small"), opened.size("prefix")
    for other, why in (("a/b", "one is inside the other"), ("b/../a", "two sizes for one folder")):
        with pytest.raises(ValueError, match=why):
            slice_all(opened, {parent / "a": one, parent / other: two}, overwrite=True)
    assert survey(parent) == before
