"""A run that is killed or asked to stop, again and again, ends like one that was not (I8)."""

import json
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command import Command
from models import SMALL, letters_tokenizer, tiny
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from waiting import until

from star_elastic.train.recipe import load_recipe
from star_elastic.train.run import train

STEPS = 40


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A run that saves after each step."""
    tiny("nemotron_h").save_pretrained(tmp_path / "parent")
    letters_tokenizer().save_pretrained(tmp_path / "parent")
    rows = [{"prompt": f"{n}+{n}=", "completion": str(2 * n)} for n in range(40)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = str(tmp_path / "data.jsonl")
    stage = {"steps": STEPS, "sequence_length": 16, "rows": 2, "learning_rate": 3e-3}
    small = {f: n for f, n in SMALL["nemotron_h"].items() if f != "num_hidden_layers"}
    values = {
        "parent": str(tmp_path / "parent"),
        "data": {"train": data, "heldout": data},
        "sizes": {"full": {}, "small": small},
        "rank": {"samples": 8},
        "balance": {"rate": 0.01},
        "train": {"stages": [stage], "save_every": 1},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    return tmp_path / "recipe.yaml"


def start(recipe: Path, out: Path) -> Command:
    return Command("train", recipe, "--out", out, "--resume")


def logged(out: Path) -> list[dict[str, Any]]:
    path = out / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(True) if line.endswith("\n")]


def wait_for(run: Command, out: Path, steps: int) -> None:
    """Until it has logged so many steps, or is over."""
    until(lambda: len(logged(out)) >= steps or run.returncode is not None, 120)


def test_a_run_that_is_stopped_in_every_way_ends_like_one_that_was_not(
    recipe: Path, tmp_path: Path
) -> None:
    whole, out, draw = tmp_path / "whole", tmp_path / "out", random.Random(0)
    train(load_recipe(recipe), whole)
    kill, term, press = signal.SIGKILL, signal.SIGTERM, signal.SIGINT
    for number in (kill, term, kill, press, kill):
        run = start(recipe, out)
        wait_for(run, out, len(logged(out)) + draw.randint(1, 3))
        time.sleep(draw.uniform(0, 0.05))
        run.send_signal(number)
        _, said = run.communicate()
        if number == kill:
            assert run.returncode == -kill, said
        else:
            assert run.returncode == 128 + number, said
            assert "to go on:" in said and "--resume" in said and "Traceback" not in said
            assert [path.suffix for path in (out / "state").iterdir()] == [""]
    last = start(recipe, out)
    wait_for(last, out, STEPS)
    last.kill()  # while it writes what it has trained, or when it has
    last.communicate()
    last = start(recipe, out)
    _, said = last.communicate()
    assert last.returncode == 0, said
    found, expected = (load_file(each / "elastic" / "model.safetensors") for each in (out, whole))
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    same_lines = [
        [(line["step"], line["losses"], line["tokens"]) for line in logged(each)]
        for each in (out, whole)
    ]
    assert same_lines[0] == same_lines[1]
    assert [step for step, _, _ in same_lines[0]] == [*range(1, STEPS + 1)]
    events = EventAccumulator(str(out / "tensorboard")).Reload().Scalars("grad_norm")
    assert [event.step for event in events] == [*range(1, STEPS + 1)]
    expected = [line["grad_norm"] for line in logged(whole)]
    assert [event.value for event in events] == pytest.approx(expected, rel=1e-6)
