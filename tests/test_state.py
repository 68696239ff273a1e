"""Stop at any step, in any way, and resume: as if never stopped, bit for bit (I8)."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from models import SMALL, letters_tokenizer, same, tiny
from safetensors.torch import load_file
from training import optimise, trainer, weights

from star_elastic.train.callbacks import Callback
from star_elastic.train.interrupt import Interrupted
from star_elastic.train.recipe import Balance, Stage
from star_elastic.train.report import StepReport
from star_elastic.train.state import States

CHANGES: dict[str, Any] = dict(accumulate=2, balance=Balance(rate=0.05))


class Press(Callback):
    """A user who presses Ctrl-C (or a scheduler that asks to stop) at the end of a step."""

    def __init__(self, step: int, number: int = signal.SIGINT):
        self.step = step
        self.number = number

    def on_step_end(self, report: StepReport) -> None:
        if report.step == self.step:
            signal.raise_signal(self.number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("family", ["nemotron_h", "qwen3_moe", "llama-tied"])
def test_stop_and_resume_is_never_stopped(family: str, number: int, tmp_path: Path) -> None:
    whole = trainer(family, teach=True, **CHANGES)
    whole.run()
    for stop in (1, 3, 5):
        folder = tmp_path / str(stop)
        first = trainer(family, folder, teach=True, **CHANGES)
        first.callbacks = [Press(stop, number)]
        with pytest.raises(Interrupted) as asked:
            first.run()
        assert asked.value.number == number
        again = trainer(family, folder, teach=True, **CHANGES)
        assert again.resume() and again.position.step == stop
        again.run()
        same(weights(again), weights(whole))
        assert again.position.tokens == whole.position.tokens


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_a_stop_at_the_border_of_stages(stop: int, tmp_path: Path) -> None:
    stages = [
        Stage(steps=2, sequence_length=24, rows=2, warmup_steps=1, learning_rate=1e-2),
        Stage(steps=3, sequence_length=24, rows=2, warmup_steps=1, learning_rate=1e-3),
    ]
    whole = trainer("llama", stages=stages)
    whole.run()
    first = trainer("llama", tmp_path, stages=stages)
    first.callbacks = [Press(stop)]
    with pytest.raises(Interrupted):
        first.run()
    again = trainer("llama", tmp_path, stages=stages)
    assert again.resume()
    again.run()
    same(weights(again), weights(whole))
    assert again.position.data == whole.position.data


def test_a_second_ctrl_c_does_not_wait(tmp_path: Path) -> None:
    first = trainer("llama", tmp_path)

    class Impatient(Callback):
        def on_step_end(self, report: StepReport) -> None:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    first.callbacks = [Impatient()]
    with pytest.raises(KeyboardInterrupt) as stopped:
        first.run()
    assert not isinstance(stopped.value, Interrupted)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_saving_often_changes_nothing(tmp_path: Path) -> None:
    whole, saving = trainer("nemotron_h"), trainer("nemotron_h", tmp_path, save_every=1)
    whole.run()
    saving.run()
    same(weights(saving), weights(whole))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000006"]


def test_nothing_to_resume(tmp_path: Path) -> None:
    assert not trainer("llama", tmp_path).resume()
    assert not trainer("llama").resume()


def test_what_a_kill_left_behind_is_no_state(tmp_path: Path) -> None:
    first = trainer("llama", tmp_path, steps=2)
    first.run()
    (tmp_path / "step-00000099.partial").mkdir()
    again = trainer("llama", tmp_path, steps=2)
    assert again.resume() and again.position.step == 2
    assert not (tmp_path / "step-00000099.partial").exists()


def test_the_older_state_goes_only_after_the_new_one_is_whole(tmp_path: Path) -> None:
    trained = trainer("llama", tmp_path)
    trained.step()
    trained.save(wait=True)
    trained.step()
    trained.save()
    assert (tmp_path / "step-00000001").is_dir()  # the new one is on its way
    assert trained.states is not None
    trained.states.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


REFUSED = """
import resource, signal, sys
sys.path[:0] = [{tests!r}]
import torch
torch.set_num_threads(1)
from pathlib import Path
from training import trainer, weights
folder = Path({folder!r})
first = trainer("llama", folder, steps=4)
first.step(); first.save(wait=True)
before = weights(first)
first.step()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))  # as a full disk would
try:
    first.save(wait=True)
except OSError as error:
    assert "\\n" not in str(error), error
    print("refused:", error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
again = trainer("llama", folder, steps=4)
assert again.resume() and again.position.step == 1
assert all(torch.equal(t, before[n]) for n, t in weights(again).items())
print([path.name for path in folder.iterdir()])
"""


def test_a_disk_that_refuses_keeps_the_state_before(tmp_path: Path) -> None:
    script = REFUSED.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said, left = done.stdout.strip().splitlines()
    assert "step-00000002" in said and "bytes free" in said and "step-00000001" in said
    assert left == "['step-00000001']"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A run of sixteen steps that saves after each."""
    tiny("nemotron_h").save_pretrained(tmp_path / "parent")
    letters_tokenizer().save_pretrained(tmp_path / "parent")
    rows = [{"prompt": f"{n}+{n}=", "completion": str(2 * n)} for n in range(40)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = str(tmp_path / "data.jsonl")
    stage = {"steps": 16, "sequence_length": 16, "rows": 2, "learning_rate": 3e-3}
    small = {f: n for f, n in SMALL["nemotron_h"].items() if f != "num_hidden_layers"}
    values = {
        "parent": str(tmp_path / "parent"),
        "data": {"train": data, "heldout": data},
        "sizes": {"full": {}, "small": small},
        "rank": {"samples": 8},
        "train": {"stages": [stage], "save_every": 1},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    return tmp_path / "recipe.yaml"


def start(recipe: Path, out: Path, *more: str) -> "subprocess.Popen[str]":
    words = [sys.executable, "-m", "star_elastic", "train", str(recipe), "--out", str(out), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(words, stdout=-1, stderr=-1, text=True, env=environment)


def lines(out: Path) -> int:
    path = out / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def when(run: "subprocess.Popen[str]", out: Path, steps: int) -> None:
    """Wait until a run has logged some steps."""
    end = time.monotonic() + 120
    while lines(out) < steps and run.poll() is None and time.monotonic() < end:
        time.sleep(0.002)


def test_a_run_killed_at_any_moment_ends_like_one_that_was_not(
    recipe: Path, tmp_path: Path
) -> None:
    whole = start(recipe, tmp_path / "whole")
    out = tmp_path / "killed"
    assert whole.wait() == 0, whole.stderr and whole.stderr.read()
    draw = random.Random(0)
    for steps in (1, 4, 9):
        run = start(recipe, out, "--resume")
        when(run, out, steps)
        time.sleep(draw.uniform(0, 0.05))
        run.kill()
        run.wait()
    last = start(recipe, out, "--resume")
    assert last.wait() == 0, last.stderr and last.stderr.read()
    found, expected = (
        load_file(folder / "elastic" / "model.safetensors") for folder in (out, tmp_path / "whole")
    )
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    steps_logged = [json.loads(line)["step"] for line in (out / "metrics.jsonl").open()]
    assert steps_logged == [*range(1, 17)]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_says_how_to_go_on(
    recipe: Path, tmp_path: Path, number: int, code: int
) -> None:
    out = tmp_path / "out"
    run = start(recipe, out)
    when(run, out, 2)
    run.send_signal(number)
    _, said = run.communicate()
    assert run.returncode == code, said
    assert "--resume" in said
    assert len([*(out / "state").glob("step-*")]) == 1


def test_states_of_nothing(tmp_path: Path) -> None:
    from star_elastic.train.distributed import World

    assert States(tmp_path / "none", World()).load({}) is None
    assert optimise().steps == 6
