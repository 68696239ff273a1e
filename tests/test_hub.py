"""Downloads by the real client of the Hugging Face hub, from a small hub of our own."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import FakeHub
from folders import WEIGHTS, refused
from transformers import AutoModelForCausalLM

from star_elastic.checkpoint import Checkpoint

NAME = "maker/elastic"
LOCAL = """
import sys
from star_elastic import hub
try:
    print(hub.local(sys.argv[1]))
except ValueError as error:
    sys.exit(f"error: {error}")
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""
MIB = 2**20


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub() as running:
        yield running


def downloaded(hub: FakeHub, home: Path, name: str = NAME, offline: bool = False) -> Path:
    done = hub.python(home, "-c", LOCAL, name, offline=offline)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


def complaint(hub: FakeHub, home: Path, name: str = NAME, offline: bool = False) -> str:
    done = hub.python(home, "-c", LOCAL, name, offline=offline)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    *_, last = done.stderr.splitlines()
    assert last.startswith(f"error: {name}: ") or "SHA-256" in last, done.stderr
    return last


def markers(home: Path) -> set[str]:
    return {path.name for path in (home / "cache/star-elastic/verified").glob("*")}


def test_a_size_is_cut_from_a_hub_id(hub: FakeHub, written: Path, tmp_path: Path) -> None:
    others = {"pytorch_model.bin": b"\x80", "modeling.py": b"raise", "tokenizer.py": b"raise"}
    files = {path.name: path.read_bytes() for path in written.iterdir()}
    hub.push(NAME, files | others | {"original/weights.safetensors": b"twice"})
    out = tmp_path / "small"
    words = ["-m", "star_elastic", "slice", NAME, "--size", "prefix", "--out", out]
    done = hub.python(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    child = Checkpoint.open(written).size("prefix").config
    assert AutoModelForCausalLM.from_pretrained(out).config.hidden_size == child["hidden_size"]
    asked = hub.files_asked()
    assert {"config.json", WEIGHTS} <= asked
    assert asked.isdisjoint({*others, "weights.safetensors"})


def test_a_download_that_was_cut_off_goes_on(hub: FakeHub, tmp_path: Path) -> None:
    # the client writes pieces of 10 MiB: of what was served, the second MiB of the last was lost
    data = os.urandom(MIB) * 12
    hub.push(NAME, {"config.json": b"{}", WEIGHTS: data})
    hub.cuts[WEIGHTS] = 11 * MIB
    assert (downloaded(hub, tmp_path) / WEIGHTS).read_bytes() == data
    assert hub.served[WEIGHTS] == 13 * MIB


def test_what_arrived_before_a_failure_is_not_asked_for_again(hub: FakeHub, tmp_path: Path) -> None:
    hub.push(NAME, {"model-1.safetensors": b"one", "model-2.safetensors": b"two"})
    hub.refused.add("model-2.safetensors")
    complaint(hub, tmp_path)
    hub.refused.clear()
    folder = downloaded(hub, tmp_path)
    assert {path.read_bytes() for path in folder.iterdir()} == {b"one", b"two"}
    assert hub.served["model-1.safetensors"] == 3


def test_a_file_that_is_not_what_the_hub_says(hub: FakeHub, tmp_path: Path) -> None:
    data = b"weights"
    hub.push(NAME, {"config.json": b"{}", WEIGHTS: data})
    hub.spoiled.add(WEIGHTS)
    for _ in range(2):  # it is not taken for checked the second time
        message = complaint(hub, tmp_path)
        (blob,) = (tmp_path / "huggingface/hub").glob(
            f"**/blobs/{hashlib.sha256(data).hexdigest()}"
        )
        found = hashlib.sha256(blob.read_bytes()).hexdigest()
        for each in (WEIGHTS, blob.name, found, f"remove {blob} to"):
            assert each in message
    assert blob.read_bytes() != data and len(blob.read_bytes()) == len(data)
    assert not markers(tmp_path)
    hub.spoiled.clear()
    blob.unlink()
    assert (downloaded(hub, tmp_path) / WEIGHTS).read_bytes() == data


def test_a_file_is_checked_once_and_again_when_it_changed(hub: FakeHub, tmp_path: Path) -> None:
    hub.push(NAME, {"config.json": b"{}", WEIGHTS: b"weights"})
    blob = (downloaded(hub, tmp_path) / WEIGHTS).resolve()
    (marker,) = markers(tmp_path)
    assert marker.startswith(f"{blob.name}-7-")
    stamp = blob.stat().st_mtime_ns
    blob.write_bytes(b"weighty")
    os.utime(blob, ns=(stamp, stamp))  # looks as it did: nobody reads it again
    assert downloaded(hub, tmp_path, offline=True).is_dir()
    os.utime(blob, ns=(stamp, stamp + 1))
    assert "SHA-256" in complaint(hub, tmp_path, offline=True)
    blob.write_bytes(b"weights")
    assert downloaded(hub, tmp_path, offline=True).is_dir()
    assert len(markers(tmp_path)) == 2


def test_a_check_that_cannot_be_remembered_is_made_again(hub: FakeHub, tmp_path: Path) -> None:
    hub.push(NAME, {WEIGHTS: b"weights"})
    (tmp_path / "cache").write_text("no folder can be made here")
    blob = (downloaded(hub, tmp_path) / WEIGHTS).resolve()
    blob.write_bytes(b"weighty")
    assert "SHA-256" in complaint(hub, tmp_path)


def test_offline_with_a_complete_cache_and_without(hub: FakeHub, tmp_path: Path) -> None:
    hub.push(NAME, {"config.json": b"{}", WEIGHTS: b"weights"})
    assert "not in the cache" in complaint(hub, tmp_path, offline=True)
    folder = downloaded(hub, tmp_path)
    asked = len(hub.asked)
    assert downloaded(hub, tmp_path, offline=True) == folder
    assert len(hub.asked) == asked
    (folder / WEIGHTS).unlink()
    assert "only in part in the cache" in complaint(hub, tmp_path, offline=True)


def test_a_hub_out_of_reach(hub: FakeHub, tmp_path: Path) -> None:
    hub.push(NAME, {"config.json": b"{}"})
    folder = downloaded(hub, tmp_path)
    hub.__exit__(None, None, None)
    assert downloaded(hub, tmp_path) == folder
    assert "out of reach" in complaint(hub, tmp_path, "maker/other")


def test_repositories_that_cannot_be_had(hub: FakeHub, tmp_path: Path) -> None:
    hub.push("maker/gated", {"config.json": b"{}"})
    hub.gated.add("maker/gated")
    hub.push(NAME, {"config.json": b"{}"})
    assert "no such folder, and the hub has no such" in complaint(hub, tmp_path, "maker/nothing")
    assert "gated" in complaint(hub, tmp_path, "maker/gated")
    assert "no such revision" in complaint(hub, tmp_path, f"{NAME}@v2")


def test_a_revision(hub: FakeHub, tmp_path: Path) -> None:
    hub.push(NAME, {"config.json": b'{"new": 1}'})
    hub.push(NAME, {"config.json": b'{"old": 1}'}, "refs/pr/1")
    assert (downloaded(hub, tmp_path, f"{NAME}@refs/pr/1") / "config.json").read_bytes()[
        2:5
    ] == b"old"
    assert (downloaded(hub, tmp_path) / "config.json").read_bytes()[2:5] == b"new"


@pytest.mark.parametrize("name", ["runs/x/elastic", "./elastic", "../elastic", "elastic/", "~/e"])
def test_a_folder_that_is_not_there(name: str) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        Checkpoint.open(name)


def test_a_folder_comes_before_a_repository(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(written.parent.parent)
    assert Checkpoint.open(f"{written.parent.name}/elastic").space.sizes.keys() >= {"small"}


def in_the_shared_store(written: Path, cache: Path) -> Path:
    """A snapshot as the client makes it of files that several repositories share."""
    snapshot, blobs = cache / "models--a--b/snapshots/0", cache / "models--a--b/blobs"
    for folder in (snapshot, blobs, cache / "blobs/ab"):
        folder.mkdir(parents=True)
    shutil.copy(written / WEIGHTS, cache / "blobs/ab/abcd")
    (blobs / "tag").symlink_to("../../blobs/ab/abcd")
    (snapshot / WEIGHTS).symlink_to("../../blobs/tag")
    shutil.copy(written / "config.json", snapshot)
    return snapshot


def test_blobs_in_the_store_of_all_repositories(written: Path, tmp_path: Path) -> None:
    snapshot = in_the_shared_store(written, tmp_path)
    assert Checkpoint.open(snapshot).space == Checkpoint.open(written).space
    (tmp_path / "blobs/ab/abcd").rename(tmp_path / "blobs/elsewhere")
    (tmp_path / "models--a--b/blobs/tag").unlink()
    (tmp_path / "models--a--b/blobs/tag").symlink_to("../../blobs/elsewhere")
    refused(snapshot, WEIGHTS, "a link out of its folder")
