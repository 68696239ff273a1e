"""Two processes with FSDP2 are one process (I7): losses, weights, states, stops."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command import Command
from models import CONFIGS, SMALL, letters_tokenizer, tiny
from safetensors.torch import load_file
from waiting import until

from star_elastic.train.callbacks import Callback
from star_elastic.train.interrupt import Interrupted
from star_elastic.train.recipe import load_recipe
from star_elastic.train.report import StepReport
from star_elastic.train.run import train

STEPS = 12


def recipe(folder: Path, family: str, train: dict[str, Any], **changes: Any) -> Path:
    """A parent, data and a recipe on the spot."""
    tiny(family).save_pretrained(folder / "parent")
    letters_tokenizer().save_pretrained(folder / "parent")
    rows = [{"prompt": f"{n}+{n}=", "completion": str(2 * n)} for n in range(40)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = str(folder / "data.jsonl")
    stage = {"steps": STEPS, "sequence_length": 24, "rows": 1, "accumulate": 4}
    stage |= {"learning_rate": 1e-2, "warmup_steps": 2}
    values: dict[str, Any] = {
        "parent": str(folder / "parent"),
        "data": {"train": data, "heldout": data},
        "rank": {"samples": 8, "depth": True},
        "train": {"stages": [stage], "same_size": 2, "save_every": 2, **train},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values | changes, sort_keys=False))
    return folder / "recipe.yaml"


def hybrid(folder: Path) -> Path:
    """A router, a size of fewer layers, gates that are balanced, blocks computed again."""
    axes = {"hidden_size": [16, 24, 32], "n_routed_experts": [4, 6], "num_hidden_layers": [5, 6]}
    fixed = {"hidden_size": 24, "num_hidden_layers": 5, "mamba_num_heads": 4}
    return recipe(
        folder,
        "nemotron_h",
        {"checkpoint_activations": True},
        sizes={"full": 1.0, "small": 0.5, "fixed": fixed},
        rank={"samples": 8, "depth": True, "min_layers": 5},
        router={"axes": axes, "every": 2, "warmup": 40},
        balance={"rate": 0.01, "aux_loss": 0.01},
    )


def dense(folder: Path) -> Path:
    """Two sizes from each micro-batch, now and then one that has no name."""
    sizes = {"full": {}, "small": SMALL["qwen3"], "thin": {"hidden_size": 24}}
    train = {"sizes_per_batch": 2, "between": 0.5, "rungs": 2}
    return recipe(folder, "qwen3", train, sizes=sizes, distil={"cross_entropy": 0.5, "hidden": 0.1})


def fresh(folder: Path) -> Path:
    """A parent from nothing."""
    init = {"config": CONFIGS["nemotron_h"], "tokenizer": str(folder / "parent")}
    return recipe(folder, "nemotron_h", {}, parent=None, init=init, balance={"rate": 0.01})


def begin(*words: object) -> list[Command]:
    """`star-elastic WORDS` in two processes, as torchrun would have them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"TORCHELASTIC_RUN_ID": "tests"}
    ranks = ("0", "1")
    return [Command(*words, environment={**shared, "RANK": n, "LOCAL_RANK": n}) for n in ranks]


def run(plan: Path, out: Path, *more: str) -> None:
    for process in begin("train", plan, "--out", out, *more):
        _, said = process.communicate()
        assert process.returncode == 0, said


def logged(out: Path) -> list[dict[str, Any]]:
    path = out / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def alike(one: Path, two: Path) -> None:
    """The same losses at every step, the same weights and the same sizes at the end."""
    assert len(logged(one)) == len(logged(two)) == STEPS
    for a, b in zip(logged(one), logged(two), strict=True):
        for key in ("step", "stage", "sizes", "tokens", "learning_rate"):
            assert a[key] == b[key], key
        for key in ("losses", "router", "grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-6), key
    folder = "elastic" if (two / "elastic").exists() else "parent"
    found, expected = (load_file(each / folder / "model.safetensors") for each in (one, two))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        # Adam steps also where a gradient is all rounding: single numbers part by up to 7e-5
        torch.testing.assert_close(found[name], tensor, atol=2e-4, rtol=1e-3, msg=name)
    assert declared(one) == declared(two)


def declared(out: Path) -> list[Any]:
    """The config fields of all sizes; none of a parent that is not elastic."""
    if not (out / "elastic").exists():
        return []
    config = json.loads((out / "elastic" / "config.json").read_text())
    return [size["config"] for size in config["elastic_config"]["submodels"]]


class Press(Callback):
    """Ctrl-C at the end of a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, report: StepReport) -> None:
        if report.step == self.step:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("plan", [dense, fresh])
def test_two_processes_are_one(plan: Any, tmp_path: Path) -> None:
    made = plan(tmp_path)
    train(load_recipe(made), tmp_path / "one")
    run(made, tmp_path / "two")
    alike(tmp_path / "two", tmp_path / "one")


def test_a_stopped_run_goes_on_with_another_number_of_processes(tmp_path: Path) -> None:
    """Two processes, asked to stop; one, asked to stop; two again to the end: as one."""
    made, out = hybrid(tmp_path), tmp_path / "out"
    train(load_recipe(made), tmp_path / "whole")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    words = [*launch, "-m", "star_elastic", "train", str(made), "--out", str(out)]
    going = subprocess.Popen(words, stdout=-1, stderr=-1, text=True, start_new_session=True)
    until(lambda: logged(out) or going.poll() is not None, 120)
    os.killpg(going.pid, signal.SIGTERM)
    _, said = going.communicate(timeout=120)
    assert going.returncode != 0 and "to go on:" in said, said
    (state,) = (out / "state").iterdir()
    done = len(logged(out))
    assert state.name == f"step-{done:08d}" and 1 <= done < STEPS - 1, said
    with pytest.raises(Interrupted):
        train(load_recipe(made), out, resume=True, callbacks=[Press(done + 1)])
    assert [path.name for path in (out / "state").iterdir()] == [f"step-{done + 1:08d}"]
    run(made, out, "--resume")
    alike(out, tmp_path / "whole")


def test_processes_must_divide_the_draws(tmp_path: Path) -> None:
    """Said before anything is ranked."""
    plan, out = dense(tmp_path), tmp_path / "out"
    done = begin("train", plan, "--out", out, "--set", "train.same_size=1")
    said = "".join(process.communicate()[1] for process in done)
    assert [process.returncode for process in done] == [1, 1]
    assert "error: train.same_size = 1: with 2 processes it must be a multiple of 2" in said
    assert not out.exists()
