"""A disk that refuses, and a source that changes: an error that says where, no half folder."""

import errno
import fcntl
import os
import resource
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
from crash import slicer, state, survey
from models import elastic, letters_tokenizer
from safetensors import safe_open
from watch import Watch

from star_elastic.checkpoint import Checkpoint
from star_elastic.folder import CheckpointError, check_room
from star_elastic.folder.output import write_file
from star_elastic.slicing import slice_all, slice_checkpoint


@pytest.fixture
def parent(sharded: Path, tmp_path: Path) -> Path:
    """A folder that holds an elastic folder of several files, and nothing else."""
    shutil.copytree(sharded, tmp_path / "here" / "elastic")
    letters_tokenizer().save_pretrained(tmp_path / "here" / "elastic")
    return tmp_path / "here"


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_order_of_changes(
    parent: Path, overwrite: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data, fsync of each file, of the folder, the new name, fsync of the parent."""
    new, old = slicer(parent / "elastic")
    if overwrite:
        old(parent / "out", False)
    watch, partial = Watch(), str(parent / ".out.partial")
    watch.install(monkeypatch.setattr)
    new(parent / "out", overwrite)
    monkeypatch.undo()
    log = watch.log
    shown = log.index(("exchange" if overwrite else "rename", f"{partial} {parent / 'out'}"))
    synced = log.index(("fsync", partial))
    assert synced == shown - 1 and log[shown + 1] == ("fsync", str(parent))
    for name in state(parent / "out"):
        path = f"{partial}/{name}"
        told = [n for n, each in enumerate(log) if each[1] == path and n < shown]
        assert [log[n][0] for n in told[:2]] == ["create", "write"]
        assert log[told[-1]][0] == "fsync" and told[-1] < synced
        assert log.index(("fsync", path)) > max(n for n in told if log[n][0] == "write")
    after = {call for call, _ in log[shown + 2 :]}
    assert after == ({"chmod", "unlink", "rmdir"} if overwrite else set())


def test_a_change_that_is_refused(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever fails, before the folder has its name: an error that says where, and no trace."""
    new, old = slicer(parent / "elastic")
    old(parent / "out", False)
    before = survey(parent)
    for stop in range(1, 100):
        watch = Refuse(stop)
        watch.install(monkeypatch.setattr)
        with pytest.raises(OSError) as error:
            new(parent / "out", True)
        monkeypatch.undo()
        assert error.value.errno == errno.EIO
        assert str(parent) in str(error.value), watch.log[-1]
        if watch.log[stop - 1][0] == "fsync" and watch.log[stop - 2][0] == "exchange":
            break
        assert survey(parent) == before, watch.log[stop - 1]
    assert 30 < stop < 99
    assert survey(parent).keys() == before.keys()
    assert "small" in (parent / "out" / "README.md").read_text()


class Refuse(Watch):
    """At the n-th change there is an error instead."""

    def _hear(self, name: str, *places: Any, dir_fd: int | None = None) -> None:
        stop, self.stop = self.stop, 0
        super()._hear(name, *places, dir_fd=dir_fd)
        self.stop = stop
        if len(self.log) == stop:
            by_descriptor = isinstance(places[0], int)  # the system knows no names then
            raise OSError(errno.EIO, "refused", *([] if by_descriptor else [str(places[0])]))


@pytest.mark.parametrize("limit", [0, 10, 4096, 50_000])
def test_a_full_disk(parent: Path, limit: int) -> None:
    opened, before = Checkpoint.open(parent / "elastic"), survey(parent)
    was = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, was[1]))  # bytes of a file
    try:
        with pytest.raises(OSError, match="File too large") as error:
            slice_checkpoint(opened, parent / "out", "small")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, was)
    assert str(parent / ".out.partial" / "model.safetensors") in str(error.value)
    assert survey(parent) == before


def test_too_little_room_is_said_first(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, before = Checkpoint.open(parent / "elastic"), survey(parent)
    free = shutil.disk_usage(parent).free
    with pytest.raises(OSError, match=rf"{2**60:,} bytes are needed and [\d,]+ are free") as error:
        check_room(parent / "no" / "such" / "folder", 2**60)
    assert error.value.errno == errno.ENOSPC and free > 0
    usage = shutil.disk_usage(parent)._replace(free=1234)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    for act in (
        lambda: slice_checkpoint(opened, parent / "out", "small"),
        lambda: elastic("llama").save_pretrained(parent / "out"),
    ):
        with pytest.raises(OSError, match="needed and 1,234 are free") as error:
            act()
        assert str(parent / "out") in str(error.value)
    assert survey(parent) == before


def test_a_source_that_shrinks_meanwhile(parent: Path) -> None:
    opened = Checkpoint.open(parent / "elastic")
    last = sorted((parent / "elastic").glob("*.safetensors"))[-1]

    def shrink(_: int) -> None:
        os.truncate(last, 1000)

    targets = {parent / "out": opened.size("small")}
    with pytest.raises(CheckpointError, match=f"{last}: .*the file ends at byte"):
        slice_all(opened, targets, progress=shrink)
    assert [path.name for path in parent.iterdir()] == ["elastic"]


def test_a_source_that_the_disk_refuses(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, before = Checkpoint.open(parent / "elastic"), survey(parent)
    calls, preadv = iter(range(100)), os.preadv

    def refuse(*args: Any) -> int:
        if next(calls) == 5:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(*args)

    monkeypatch.setattr(os, "preadv", refuse)
    with pytest.raises(CheckpointError, match=r"model-0\S+: \S+: cannot be read: .*Input/output"):
        slice_checkpoint(opened, parent / "out", "small")
    assert survey(parent) == before


def test_writes_that_fall_short(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new, _ = slicer(parent / "elastic")
    new(parent / "whole", False)
    write, short = os.write, []

    def some(file: int, data: memoryview) -> int:
        short.append(write(file, data[: len(data) // 3 + 1]))
        return short[-1]

    monkeypatch.setattr(os, "write", some)
    new(parent / "out", False)
    assert len(short) > 20
    assert state(parent / "out") == state(parent / "whole")


def test_a_disk_that_takes_no_direct_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may say so only when the write comes."""
    write, direct = os.write, []

    def picky(file: int, data: memoryview) -> int:
        direct.append(bool(fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT))
        if direct[-1]:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return write(file, data)

    data = os.urandom(20_000_000)
    monkeypatch.setattr(os, "write", picky)
    write_file(tmp_path / "file", data)
    assert direct == [True, False, False, False]
    assert (tmp_path / "file").read_bytes() == data


def test_modes_are_those_of_cp(parent: Path) -> None:
    (parent / "elastic" / "tokenizer.json").chmod(0o640)
    opened = Checkpoint.open(parent / "elastic")
    before = os.umask(0o027)
    try:
        slice_checkpoint(opened, parent / "out", "small")
        subprocess.run(["cp", "-r", parent / "elastic", parent / "copy"], check=True)
        os.umask(0o022)
        (parent / "out").chmod(0o700)
        modes = {path.name: mode(path) for path in (parent / "out").iterdir()}
        slice_checkpoint(opened, parent / "out", "small", overwrite=True)
        assert mode(parent / "out") == 0o700  # what was private stays so
    finally:
        os.umask(before)
    assert mode(parent / "copy") == 0o750
    for name in ("config.json", "README.md", "tokenizer.json", "tokenizer_config.json"):
        assert modes[name] == mode(parent / "copy" / name) == 0o640
    assert mode(parent / "out" / "tokenizer.json") == 0o640
    assert mode(parent / "out" / "config.json") == 0o644


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_killed_writers_mode_is_forgotten(parent: Path) -> None:
    new, _ = slicer(parent / "elastic")
    (parent / ".out.partial").mkdir(0o500)
    new(parent / "out", False)
    (parent / "plain").mkdir()
    assert mode(parent / "out") == mode(parent / "plain")


def test_the_size_of_shards_changes_no_tensor(parent: Path) -> None:
    opened = Checkpoint.open(parent / "elastic")
    for name, size in (("one", 10**9), ("again", 10**9), ("many", 3_000)):
        slice_checkpoint(opened, parent / name, "small", max_shard_size=size)
    assert state(parent / "one") == state(parent / "again")
    assert len([*(parent / "many").glob("*.safetensors")]) > 10
    assert digests(parent / "many") == digests(parent / "one")


def digests(folder: Path) -> dict[str, bytes]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="np") as file:
            found |= {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118
    return found


def test_an_exchange_that_fails_half_way_is_undone(
    parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new, old = slicer(parent / "elastic")
    old(parent / "out", False)
    before, rename = survey(parent), os.rename

    def refuse(source: Path, target: Path) -> None:
        if Path(source).name == ".out.partial":
            raise OSError(errno.EIO, "refused", str(source))
        rename(source, target)

    Watch(exchange=False).install(monkeypatch.setattr)
    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(OSError, match="refused"):
        new(parent / "out", True)
    assert survey(parent) == before
