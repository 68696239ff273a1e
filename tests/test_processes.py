"""Two processes with FSDP2 are one process (I7): losses, weights, states, stops."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from models import SMALL, letters_tokenizer, tiny
from safetensors.torch import load_file

STEPS = 6


def recipe(folder: Path, family: str, **changes: Any) -> Path:
    """A parent, data and a recipe on the spot."""
    tiny(family).save_pretrained(folder / "parent")
    letters_tokenizer().save_pretrained(folder / "parent")
    rows = [{"prompt": f"{n}+{n}=", "completion": str(2 * n)} for n in range(40)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = str(folder / "data.jsonl")
    stage = {"steps": STEPS, "sequence_length": 24, "rows": 1, "accumulate": 4}
    values: dict[str, Any] = {
        "parent": str(folder / "parent"),
        "data": {"train": data, "heldout": data},
        "rank": {"samples": 8, "depth": True},
        "train": {"stages": [stage | {"learning_rate": 1e-2, "warmup_steps": 2}], "same_size": 2},
    }
    values["train"]["save_every"] = 2
    (folder / f"{family}.yaml").write_text(yaml.safe_dump(values | changes, sort_keys=False))
    return folder / f"{family}.yaml"


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A router, a size of fewer layers, gates that are balanced, blocks computed again."""
    folder = tmp_path_factory.mktemp("hybrid")
    axes = {"hidden_size": [16, 24, 32], "n_routed_experts": [4, 6], "num_hidden_layers": [5, 6]}
    fixed = {"hidden_size": 24, "num_hidden_layers": 5, "mamba_num_heads": 4}
    return recipe(
        folder,
        "nemotron_h",
        sizes={"full": 1.0, "small": 0.5, "fixed": fixed},
        rank={"samples": 8, "depth": True, "min_layers": 5},
        router={"axes": axes, "every": 2, "warmup": 40},
        balance={"rate": 0.01, "aux_loss": 0.01},
    )


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"full": {}, "small": {f: n for f, n in SMALL["qwen3"].items()}}
    return recipe(tmp_path_factory.mktemp("dense"), "qwen3", sizes=sizes)


def start(plan: Path, out: Path, processes: int, *more: str) -> "subprocess.Popen[str]":
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone"]
        launch += ["--nproc-per-node", str(processes)]
    words = [*launch, "-m", "star_elastic", "train", str(plan), "--out", str(out), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(words, stdout=-1, stderr=-1, text=True, env=environment)


def run(plan: Path, out: Path, processes: int, *more: str) -> None:
    done = start(plan, out, processes, *more)
    _, said = done.communicate(timeout=240)
    assert done.returncode == 0, said


def logged(out: Path) -> list[dict[str, Any]]:
    path = out / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def alike(one: Path, two: Path) -> None:
    """The same losses at every step, the same weights and the same sizes at the end."""
    assert len(logged(one)) == len(logged(two)) == STEPS
    for a, b in zip(logged(one), logged(two), strict=True):
        assert a["sizes"] == b["sizes"] and a["tokens"] == b["tokens"]
        assert a["losses"] == pytest.approx(b["losses"], rel=1e-4, abs=1e-6)
        assert a["router"] == pytest.approx(b["router"], rel=1e-4, abs=1e-6)
    files = [path / "elastic" / "model.safetensors" for path in (one, two)]
    found, expected = map(load_file, files)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=2e-5, rtol=1e-3, msg=name)
    configs = [json.loads((p / "elastic" / "config.json").read_text()) for p in (one, two)]
    sizes = [[s["config"] for s in c["elastic_config"]["submodels"]] for c in configs]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("which", ["hybrid", "dense"])
def test_two_processes_are_one(which: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    plan: Path = request.getfixturevalue(which)
    run(plan, tmp_path / "one", 1)
    run(plan, tmp_path / "two", 2)
    alike(tmp_path / "one", tmp_path / "two")


def test_a_stopped_run_goes_on_with_another_number_of_processes(
    hybrid: Path, tmp_path: Path
) -> None:
    """Two processes, asked to stop; one, asked to stop; two again to the end."""
    run(hybrid, tmp_path / "whole", 1)
    out = tmp_path / "out"
    for processes, steps in ((2, 1), (1, 3)):
        going = start(hybrid, out, processes, "--resume")
        end = time.monotonic() + 120
        while len(logged(out)) < steps and going.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        going.send_signal(signal.SIGTERM)
        _, said = going.communicate(timeout=120)
        assert going.returncode != 0, said
        assert [path for path in (out / "state").iterdir() if path.suffix != ".partial"], said
    run(hybrid, out, 2, "--resume")
    alike(out, tmp_path / "whole")


def test_processes_must_divide_the_draws(dense: Path, tmp_path: Path) -> None:
    done = start(dense, tmp_path / "out", 2, "--set", "train.same_size=1")
    _, said = done.communicate(timeout=120)
    assert done.returncode != 0
    assert "train.same_size = 1: with 2 processes it must be a multiple of 2" in said
