"""A writer that is killed, refused or disturbed at any instant leaves the old folder or the new."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from models import elastic, letters_tokenizer

from star_elastic import tensors

BUSY = "another process is writing this folder"
MEMORY = Path("/dev/shm")  # where a thousand fsyncs take no time


@pytest.fixture(scope="module")
def source() -> Iterator[Path]:
    """An elastic folder of several files, with all that goes along, alone in its parent folder."""
    quick = MEMORY if os.access(MEMORY, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=quick) as parent:
        folder = Path(parent) / "elastic"
        model = elastic("nemotron_h")
        tensors.write(
            folder,
            model.state,
            model.layout,
            model.space,
            tokenizer=letters_tokenizer(),
            max_shard_size=60_000,
        )
        yield folder


def driven(kind: str, source: Path, *verbs: str) -> dict[str, Any]:
    """What tests/crash.py, a process of one thread, found."""
    script = str(Path(__file__).with_name("crash.py"))
    words = [sys.executable, script, kind, str(source), *verbs]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def slices(source: Path) -> dict[str, Any]:
    verbs = ("fresh", "overwrite", "two_renames", "locks", "cleaning", "race")
    return driven("slice", source, *verbs)


def all_killed(found: dict[str, Any], *expected: str) -> None:
    calls = found["calls"]
    assert {*expected} <= {*calls}, calls
    assert found["kills"] == len(calls) + calls.count("write")  # writes half-way too
    assert found["broken"] == []


def test_a_kill_leaves_nothing_or_all(slices: dict[str, Any]) -> None:
    all_killed(slices["fresh"], "mkdir", "create", "write", "fsync", "rename")


def test_a_kill_while_replacing_leaves_the_old_or_the_new(slices: dict[str, Any]) -> None:
    """There is no instant without a target."""
    all_killed(slices["overwrite"], "create", "write", "fsync", "exchange", "unlink", "rmdir")


def test_a_kill_between_two_renames_is_put_right(slices: dict[str, Any]) -> None:
    """Where nothing can be exchanged, the next writer puts the old folder back first."""
    all_killed(slices["two_renames"], "rename", "unlink", "rmdir", "fsync")
    assert slices["two_renames"]["calls"][:2] == ["rename", "rename"]


def test_a_kill_while_writing_out_of_memory(source: Path) -> None:
    found = driven("write", source, "overwrite")["overwrite"]
    all_killed(found, "create", "write", "fsync", "exchange", "unlink", "rmdir")


def test_a_kill_while_quantizing(source: Path) -> None:
    found = driven("quantize", source, "overwrite")["overwrite"]
    all_killed(found, "create", "write", "fsync", "exchange", "unlink", "rmdir")


def test_one_writer_at_a_time_until_it_dies(slices: dict[str, Any]) -> None:
    second, killed, third, left = slices["locks"]
    assert BUSY in second and killed == 9 and third is None
    assert left == ["elastic", "out"]


def test_nobody_writes_where_another_still_removes(slices: dict[str, Any]) -> None:
    second, first, left = slices["cleaning"]
    assert BUSY in second and first is None
    assert left == ["elastic", "out"]


def test_of_two_writers_at_once_one_wins(slices: dict[str, Any]) -> None:
    for overwrite, errors, whole, left in slices["race"]:
        said = [error for error in errors if error is not None]
        assert len(said) <= 1 if overwrite else len(said) == 1
        assert all(BUSY in each or "exists already" in each for each in said), said
        assert whole and left == ["elastic", "out"]
