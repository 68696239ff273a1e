"""A short run of each fuzz target; the long ones are `python -m bench.fuzz` with more `--runs`."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("atheris")  # libFuzzer: Linux only

ROOT = Path(__file__).parent.parent


def python(where: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Python in a folder of its own, where libFuzzer may leave its findings."""
    command = [sys.executable, *arguments]
    return subprocess.run(
        command,
        cwd=where,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("target", "inputs"), [("header", 20_000), ("index", 20_000), ("elastic", 500)]
)
def test_nothing_but_our_own_error(target: str, inputs: int, tmp_path: Path) -> None:
    done = python(tmp_path, "-m", "bench.fuzz", target, "--runs", str(inputs), "--seed", "7")
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"stat::number_of_executed_units: {inputs}\n" in done.stderr
    covered = re.findall(r"cov: (\d+)", done.stderr)
    assert int(covered[-1]) > 40  # it got past the JSON parser
    assert not list(tmp_path.iterdir())


def test_a_finding_ends_the_run(tmp_path: Path) -> None:
    """The check of the check: an error of another kind, a slow input, a wrong acceptance."""
    code = (
        "import time\n"
        "from bench.fuzz import guarded\n"
        "def slow(_):\n"
        "    while time.process_time() < start + 1.1: pass\n"
        "def wrong(_): assert False\n"
        "def ours(_): raise ValueError('ours')\n"
        "start = time.process_time()\n"
        "for target in (slow, wrong, lambda _: {}['key'], lambda _: [][0], ours):\n"
        "    try:\n"
        "        guarded(target)(b'')\n"
        "        print('passed')\n"
        "    except BaseException as error:\n"
        "        print(type(error).__name__)\n"
    )
    found = python(tmp_path, "-c", code).stdout.split()
    assert found == ["TimeoutError", "AssertionError", "KeyError", "IndexError", "passed"]
