"""Stop at any step, in any way, and resume: as if never stopped, bit for bit (I8)."""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import elastic, same
from training import trainer, weights

from star_elastic.folder import CheckpointError
from star_elastic.model import ElasticModel
from star_elastic.train.callbacks import Callback
from star_elastic.train.distributed import World
from star_elastic.train.interrupt import Interrupted
from star_elastic.train.recipe import Balance
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


@pytest.mark.parametrize("family", ["nemotron_h", "qwen3_moe", "llama-tied"])
def test_stop_and_resume_is_never_stopped(family: str, tmp_path: Path) -> None:
    whole = trainer(family, teach=True, **CHANGES)
    whole.run()
    for stop, number in ((1, signal.SIGINT), (3, signal.SIGTERM), (5, signal.SIGINT)):
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


def test_what_is_saved_is_the_moment_of_the_call(tmp_path: Path) -> None:
    """However the weights move while the state is being written."""
    trained = trainer("llama", tmp_path)
    trained.step()
    before = weights(trained)
    trained.save()
    with torch.no_grad():
        for tensor in trained.weights.values():
            tensor.zero_()
    assert trained.states is not None
    trained.states.wait()
    again = trainer("llama", tmp_path)
    assert again.resume()
    same(weights(again), before)


def test_a_state_is_announced_once(tmp_path: Path) -> None:
    saved: list[int] = []

    class Saves(Callback):
        def on_save(self, step: int) -> None:
            saved.append(step)

    trained = trainer("llama", tmp_path, save_every=2)
    trained.callbacks = [Saves()]
    trained.run()
    assert saved == [2, 4, 6]


def test_a_state_of_other_tensors_is_refused(tmp_path: Path) -> None:
    trained = trainer("llama", tmp_path, steps=1)
    trained.run()
    for other in (trainer("qwen3", tmp_path), trainer("llama", tmp_path, model=wider())):
        with pytest.raises(CheckpointError, match=r"step-00000001: no state of this run") as error:
            other.resume()
        assert "\n" not in str(error.value)


def wider() -> ElasticModel:
    return elastic("llama", intermediate_size=32)


def test_a_damaged_state_is_refused(tmp_path: Path) -> None:
    trainer("llama", tmp_path, steps=1).run()
    for path in tmp_path.glob("step-*/*.distcp"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"step-00000001: no state of this run: \w+"):
        trainer("llama", tmp_path).resume()


REFUSED = """
import resource, signal, sys
sys.path[:0] = [{tests!r}]
import torch
torch.set_num_threads(1)
from pathlib import Path
from training import trainer, weights
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

def limit(size):  # as a full disk would
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

for size in (10, 4096):  # not even the position; not the tensors
    folder = Path({folder!r}) / str(size)
    first = trainer("llama", folder, steps=4, save_every=1)
    first.step(); first.save(wait=True)
    before = weights(first)
    limit(size)
    try:
        first.run()
    except OSError as error:
        limit(resource.RLIM_INFINITY)
        print("refused:", error)
    print([path.name for path in folder.iterdir()])
    again = trainer("llama", folder, steps=4)
    assert again.resume() and again.position.step == 1
    assert all(torch.equal(t, before[n]) for n, t in weights(again).items())
"""


def test_a_disk_that_refuses_keeps_the_state_before(tmp_path: Path) -> None:
    script = REFUSED.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.strip().splitlines()
    assert len(lines) == 4, lines  # the errors have one line each
    for said, left, size in zip(lines[::2], lines[1::2], ("10", "4096"), strict=True):
        assert f"{tmp_path / size}/step-00000002" in said and "bytes free" in said
        assert "newest whole state: step-00000001" in said
        assert left == "['step-00000001']"
    assert "File too large" in lines[0]


def test_states_of_nothing(tmp_path: Path) -> None:
    assert States(tmp_path / "none", World()).load({}) is None
