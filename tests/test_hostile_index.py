"""Indexes and weight files nobody vouches for: no path leads out, no pipe is waited for."""

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from folders import EMBEDDINGS, INDEX, WEIGHTS, edit_json
from hostile import answers, refuses
from safetensors.torch import load_file, save_file

from star_elastic.checkpoint import Checkpoint
from star_elastic.folder import CheckpointError
from star_elastic.model import ElasticModel
from star_elastic.slicing import slice_checkpoint

FIRST = "model-00001-of-"  # how every first shard's name begins

# id -> the file that the index names for the embeddings
PLACES = {
    "absolute": "/etc/passwd.safetensors",
    "parent": "../x.safetensors",
    "there-and-back": "a/../../x.safetensors",
    "subfolder": "sub/x.safetensors",
    "dot": "./x.safetensors",
    "backslash": "..\\x.safetensors",
    "drive": "C:\\x.safetensors",
    "drive-relative": "C:x.safetensors",
    "url": "https://example.com/x.safetensors",
    "nul": "x\0.safetensors",
    "nul-inside": "x.safetensors\0.safetensors",
    "256-bytes": "x" * 244 + ".safetensors",
    "empty": "",
    "this-folder": ".",
    "parent-folder": "..",
    "pickle": "pytorch_model.bin",
    "torch": "model.pt",
    "numpy": "model.npz",
    "upper-case-ending": "model.SAFETENSORS",
    "config": "config.json",
}


@pytest.mark.parametrize("name", PLACES)
def test_a_place_that_is_no_weight_file(shards: Path, name: str) -> None:
    place = PLACES[name]
    edit_json(shards / INDEX, lambda index: index["weight_map"].update({EMBEDDINGS: place}))
    refuses(shards, f"elastic/{INDEX}: {EMBEDDINGS}: {place[:80]!r} is not a weight file of this")


def test_a_place_that_no_file_system_has(shards: Path) -> None:
    name = "\ud800.safetensors"
    edit_json(shards / INDEX, lambda index: index["weight_map"].update({EMBEDDINGS: name}))
    refuses(shards, "elastic: '\\ud800.safetensors' is not a file of this folder")


# id -> the whole index, what the error names beside the file
INDEXES: dict[str, tuple[str | bytes, tuple[str, ...]]] = {
    "empty": ("", ("not readable as JSON", "Expecting value")),
    "not-json": ("{", ("not readable as JSON",)),
    "array": ("[]", ("not a JSON object",)),
    "bad-utf-8": (b'{"\xff": 1}', ("not readable as JSON", "utf-8")),
    "deep": ('{"weight_map":' + "[" * 100_000, ("nested too deep",)),
    "no-map": ("{}", ("weight_map: not a map",)),
    "map-null": ('{"weight_map": null}', ("weight_map: not a map",)),
    "map-list": ('{"weight_map": [["a", "b"]]}', ("weight_map: not a map",)),
    "map-text": ('{"weight_map": "model.safetensors"}', ("weight_map: not a map",)),
    "place-number": ('{"weight_map": {"a": 1}}', ("weight_map: not a map from tensor to file",)),
    "place-null": ('{"weight_map": {"a": null}}', ("weight_map: not a map from tensor to file",)),
    "place-list": ('{"weight_map": {"a": ["b"]}}', ("weight_map: not a map from tensor to file",)),
    "twice-a-map": ('{"weight_map": {}, "weight_map": {}}', ("duplicate key 'weight_map'",)),
    "twice-a-tensor": (
        '{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}',
        ("duplicate key 'a'",),
    ),
    "metadata-list": ('{"weight_map": {}, "metadata": []}', ("metadata: not a map",)),
    "metadata-number": ('{"weight_map": {}, "metadata": 7}', ("metadata: not a map",)),
    "tensors-of-no-file": (
        '{"weight_map": {"a\\nb": "x"}}',
        ("'a\\nb': 'x' is not a weight file",),
    ),
}


@pytest.mark.parametrize("name", INDEXES)
def test_an_index_that_is_none(shards: Path, name: str) -> None:
    text, named = INDEXES[name]
    (shards / INDEX).write_bytes(text if isinstance(text, bytes) else text.encode())
    refuses(shards, f"elastic/{INDEX}: ", *named)


TOTALS: dict[str, tuple[Any, str]] = {
    "text": ("1000", "not a number of bytes"),
    "bool": (True, "not a number of bytes"),
    "list": ([], "not a number of bytes"),
    "negative": (-1, "not a number of bytes"),
    "fraction": (0.5, "not a number of bytes"),
    "infinite": (float("inf"), "not a number of bytes"),
    "nan": (float("nan"), "not a number of bytes"),
    "zero": (0, ": 0, the files hold"),
    "huge": (2**64, f": {2**64}, the files hold"),
    "of-2000-digits": (10**2000, ": 10000000000000000000, the files hold"),
}


@pytest.mark.parametrize("name", TOTALS)
def test_a_total_that_is_wrong(shards: Path, name: str) -> None:
    total, named = TOTALS[name]
    edit_json(shards / INDEX, lambda index: index["metadata"].update(total_size=total))
    refuses(shards, f"elastic/{INDEX}: metadata.total_size", named)


def test_a_total_off_by_one(shards: Path) -> None:
    held = json.loads((shards / INDEX).read_text())["metadata"]["total_size"]
    edit_json(shards / INDEX, lambda index: index["metadata"].update(total_size=held + 1))
    refuses(shards, f"{INDEX}: metadata.total_size: {held + 1}, the files hold {held}")


def test_an_index_longer_than_is_read(shards: Path) -> None:
    """It is not even read: the file is sparse."""
    with (shards / INDEX).open("wb") as file:
        file.truncate(2**30)
    refuses(shards, f"elastic/{INDEX}: {2**30} bytes; at most")


def first(shards: Path) -> Path:
    return next(shards.glob(f"{FIRST}*"))


def test_a_shard_of_no_bytes(shards: Path) -> None:
    first(shards).write_bytes(b"")
    refuses(shards, FIRST, "0 bytes, too few for a header")


def test_a_tensor_in_two_shards(shards: Path) -> None:
    index = json.loads((shards / INDEX).read_text())
    home = index["weight_map"][EMBEDDINGS]
    other = next(file for file in index["weight_map"].values() if file != home)
    tensors = load_file(shards / other) | {EMBEDDINGS: load_file(shards / home)[EMBEDDINGS]}
    save_file(tensors, shards / other)
    refuses(shards, f"{max(home, other)}: {EMBEDDINGS}: also in {min(home, other)}")


def test_a_tensor_in_the_index_only(shards: Path) -> None:
    name = first(shards).name
    edit_json(shards / INDEX, lambda index: index["weight_map"].update(spare=name))
    refuses(shards, f"{INDEX}: spare: only in the index")


def test_a_tensor_in_a_shard_only(shards: Path) -> None:
    edit_json(shards / INDEX, lambda index: index["weight_map"].pop(EMBEDDINGS))
    refuses(shards, f"{INDEX}: {EMBEDDINGS}: only in the files")


def test_another_file_beside_an_index(shards: Path) -> None:
    """Stock classes would load that file, and not those that were verified."""
    shutil.copy(first(shards), shards / WEIGHTS)
    refuses(shards, f"{INDEX}: {WEIGHTS} is there too, and is none of its files")


def test_an_index_of_the_one_file(folder: Path) -> None:
    places = dict.fromkeys(load_file(folder / WEIGHTS), WEIGHTS)
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))
    assert Checkpoint.open(folder).is_elastic


def fifo(path: Path) -> None:
    os.mkfifo(path)


def linked_fifo(path: Path) -> None:
    os.mkfifo(path.parent / "pipe")
    path.symlink_to("pipe")


def bound_socket(path: Path) -> None:
    here = os.open(path.parent, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(f"/proc/self/fd/{here}/{path.name}")  # short, whatever the folder's path
    os.close(here)


def linked_folder(path: Path) -> None:
    (path.parent / "sub").mkdir()
    path.symlink_to("sub")


def stolen(path: Path) -> None:
    """A link to a file outside that would be sound in its place."""
    outside = path.parent.parent / "outside.safetensors"
    shutil.move(path.parent / "moved", outside)
    path.symlink_to(outside)


def circle(path: Path) -> None:
    (path.parent / "back").symlink_to(path.name)
    path.symlink_to("back")


# id -> what stands in a file's place, what the error says of it
STAND_INS: dict[str, tuple[Callable[[Path], object], str]] = {
    "pipe": (fifo, "not a regular file"),
    "link-to-pipe": (linked_fifo, "not a regular file"),
    "socket": (bound_socket, "not a regular file"),
    "folder": (Path.mkdir, "not a regular file"),
    "link-to-folder": (linked_folder, "not a regular file"),
    "zeros": (lambda path: path.symlink_to("/dev/zero"), "a link out of its folder"),
    "terminal": (lambda path: path.symlink_to("/dev/tty"), "a link out of its folder"),
    "password": (lambda path: path.symlink_to("/etc/passwd"), "a link out of its folder"),
    "parent": (lambda path: path.symlink_to(".."), "a link out of its folder"),
    "outside": (stolen, "a link out of its folder"),
    "circle": (circle, "cannot be read: Symlink loop"),
    "itself": (lambda path: path.symlink_to(path.name), "cannot be read: Symlink loop"),
    "dangling": (lambda path: path.symlink_to("nowhere"), "cannot be read: [Errno 2] No such"),
}


@pytest.mark.parametrize("name", STAND_INS)
@pytest.mark.parametrize("file", ["shard", INDEX, "config.json"])
def test_something_else_in_place_of_a_file(shards: Path, file: str, name: str) -> None:
    make, named = STAND_INS[name]
    path = first(shards) if file == "shard" else shards / file
    path.rename(shards / "moved")
    make(path)
    refuses(shards, "elastic/", named)


HELD_OPEN = ["generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt"]


@pytest.mark.parametrize("file", HELD_OPEN)
def test_a_pipe_for_a_stock_loader_to_wait_on(folder: Path, file: str) -> None:
    (folder / file).unlink(missing_ok=True)
    os.mkfifo(folder / file)
    with answers(folder, f"elastic/{file}: not a regular file"):
        ElasticModel.from_pretrained(folder)


def test_links_of_a_hub_cache(sharded: Path, tmp_path: Path) -> None:
    """snapshots/REVISION/file -> ../../blobs/DIGEST is how every download looks."""
    snapshot, blobs = tmp_path / "snapshots" / "0f1e", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(sharded.iterdir())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    opened = Checkpoint.open(snapshot)
    slice_checkpoint(opened, tmp_path / "out", "small")
    assert Checkpoint.open(tmp_path / "out").layout.sizes["hidden_size"] == 24


def test_a_link_out_of_a_hub_cache(sharded: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshots" / "0f1e"
    (tmp_path / "blobs").mkdir()
    shutil.copytree(sharded, snapshot)
    first(snapshot).rename(tmp_path / "stolen")
    (snapshot / f"{FIRST}x").symlink_to("../../stolen")
    with pytest.raises(CheckpointError, match=f"{FIRST}x: a link out of its folder"):
        Checkpoint.open(snapshot)
