"""A whole run of a recipe: what it writes, and that stopping it changes nothing (I8)."""

import json
import shutil
import signal
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from models import elastic, letters_tokenizer, logits, same, token_ids
from runs import WIDTHS, logged, make_data, recipe
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from star_elastic.checkpoint import Checkpoint
from star_elastic.folder import digest
from star_elastic.layout import Layout
from star_elastic.model import ElasticModel
from star_elastic.slicing import slice_checkpoint
from star_elastic.train.baselines import train_alone
from star_elastic.train.callbacks import Callback, JsonLines
from star_elastic.train.interrupt import Interrupted
from star_elastic.train.report import StepReport
from star_elastic.train.router import ROUTER, load_router
from star_elastic.train.run import streams, train
from star_elastic.train.trainer import DivergedError

AXES = {
    "hidden_size": [16, 24, 32],
    "moe_intermediate_size": [8, 16],
    "n_routed_experts": [4, 6],
    "num_hidden_layers": [5, 6],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("run"))


class Heard(Callback):
    """Notes what it hears; presses Ctrl-C after a step, if asked to."""

    def __init__(self, stop: int = 0):
        self.events: list[str] = []
        self.stop = stop

    def on_train_begin(self, step: int, recipe: Any) -> None:
        self.events.append(f"begin {step} {recipe['name']}")

    def on_step_end(self, report: StepReport) -> None:
        self.events.append(f"step {report.step}")
        if report.step == self.stop:
            signal.raise_signal(signal.SIGINT)

    def on_save(self, step: int) -> None:
        self.events.append(f"save {step}")

    def on_train_end(self) -> None:
        self.events.append("end")


def stored(folder: Path) -> dict[str, Tensor]:
    return dict(Checkpoint.open(folder).tensors())


def test_a_run_writes_what_it_says(folder: Path, tmp_path: Path) -> None:
    out, heard, said = tmp_path / "out", Heard(), []
    written = train(recipe(folder), out, callbacks=[heard], say=said.append)
    assert written == out / "elastic"
    assert [line["step"] for line in logged(out)] == [*range(1, 9)]
    steps = [f"step {n}" for n in range(1, 9)]
    saves = {4: "save 4", 8: "save 8"}
    expected = [e for n, step in enumerate(steps, 1) for e in (step, saves.get(n)) if e]
    assert heard.events == ["begin 0 recipe", *expected, "end"]
    before, after = Checkpoint.open(out / "sorted"), Checkpoint.open(written)
    untrained = {size.name for size in before.space.submodels if not size.trained}
    assert untrained == {"small", "prefix"}
    assert {size.trained for size in after.space.submodels} == {True}
    assert [*after.space.sizes] == ["full", "small", "prefix"]
    assert after.space.axes["hidden_size"].multiple_of == 8
    assert after.space.training is not None
    assert (after.space.training.recipe, after.space.training.steps) == ("recipe", 8)
    assert after.space.training.tokens == logged(out)[-1]["tokens"]
    assert (written / "tokenizer_config.json").is_file()
    plan = "\n".join(said)
    assert "stage 0: 8 steps of 96 tokens (24 a row), 768 tokens" in plan
    full = elastic("nemotron_h").layout.count()
    assert f"size full: {full:,} parameters, 100.0% of the active ones" in plan
    assert "memory a process" in plan and "minutes, by one micro-batch of each size" in plan


def test_tensorboard_has_the_same_scalars(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(Interrupted):
        train(recipe(folder), out, callbacks=[Heard(stop=5)])
    time.sleep(1.1)  # event files are read in the order of their names, which tell the second
    train(recipe(folder), out, resume=True)
    board = EventAccumulator(str(out / "tensorboard")).Reload()
    for name in ("small", "full"):
        events = [(e.step, e.value) for e in board.Scalars(f"loss/{name}")]
        lines = [line for line in logged(out) if name in line["losses"]]
        assert [step for step, _ in events] == [line["step"] for line in lines]
        torch.testing.assert_close(
            [value for _, value in events],
            [line["losses"][name] for line in lines],
            rtol=1e-6,
            atol=0,
        )
    for name in ("grad_norm", "learning_rate", "tokens"):
        events = board.Scalars(name)
        assert [event.step for event in events] == [*range(1, 9)]  # none twice
        expected = [line[name] for line in logged(out)]
        assert [event.value for event in events] == pytest.approx(expected, rel=1e-6)


def test_the_sorted_parent_says_what_the_parent_says(folder: Path, whole: Path) -> None:
    ids = token_ids()
    found = ElasticModel.from_pretrained(whole.parent / "sorted").parent
    expected = ElasticModel.from_pretrained(folder / "parent").parent
    torch.testing.assert_close(logits(found, ids), logits(expected, ids), atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, never stopped."""
    return train(recipe(folder), tmp_path_factory.mktemp("whole") / "out")


@pytest.mark.parametrize("stop", [1, 5, 8])
def test_an_interrupted_run_ends_like_one_that_was_not(
    folder: Path, whole: Path, tmp_path: Path, stop: int
) -> None:
    with pytest.raises(Interrupted):
        train(recipe(folder), tmp_path / "out", callbacks=[Heard(stop)])
    assert not (tmp_path / "out" / "elastic").exists()
    again = train(recipe(folder), tmp_path / "out", resume=True)
    same(stored(again), stored(whole))
    assert Checkpoint.open(again).space == Checkpoint.open(whole).space
    assert [line["step"] for line in logged(tmp_path / "out")] == [*range(1, 9)]


def test_a_run_never_overwrites_another(folder: Path, whole: Path) -> None:
    before, lines = stored(whole), logged(whole.parent)
    with pytest.raises(FileExistsError, match="holds a run already"):
        train(recipe(folder), whole.parent)
    same(stored(whole), before)
    assert logged(whole.parent) == lines


def test_a_parent_that_was_not_sorted_to_the_end_is_sorted_again(
    folder: Path, whole: Path, tmp_path: Path
) -> None:
    """A kill may leave weights in their order, and nothing of sizes or scores."""
    shutil.copytree(folder / "parent", tmp_path / "sorted.partial")
    same(stored(train(recipe(folder), tmp_path, resume=True)), stored(whole))
    assert not (tmp_path / "sorted.partial").exists()
    assert len(Checkpoint.open(tmp_path / "sorted").space.submodels) == 3


def test_a_router_finds_the_sizes(folder: Path, tmp_path: Path) -> None:
    plan = recipe(
        folder,
        sizes={"full": 1.0, "small": 0.5},
        rank={"samples": 8, "depth": True, "min_layers": 5},
        router={"axes": AXES, "every": 2, "warmup": 60, "per_layer": ["moe_intermediate_size"]},
    )
    out = tmp_path / "out"
    with pytest.raises(Interrupted):
        train(plan, out, callbacks=[Heard(stop=5)])
    opened = Checkpoint.open(train(plan, out, resume=True))
    assert any("small/loss" in line["router"] for line in logged(out))
    router = load_router(opened.path / ROUTER, opened.layout)
    index = json.loads((opened.path / "model.safetensors.index.json").read_text())
    assert {*index["weight_map"].values()} == {"model.safetensors"}  # and not the router
    assert opened.space.digests[ROUTER] == digest(opened.path / ROUTER)
    assert opened.size("full").config == router.fields(1.0) == {}
    small = opened.size("small")
    assert small.config == router.fields(0.5)
    assert small.active_params < 0.6 * opened.layout.count_active()
    whole = Checkpoint.open(train(plan, tmp_path / "whole"))
    assert whole.space == opened.space
    same(stored(whole.path), stored(opened.path))


def test_sizes_whose_layers_differ_run_and_are_no_slice(folder: Path, tmp_path: Path) -> None:
    uneven = {"moe_intermediate_size": [16, 8, 16, 16, 16, 8]}
    plan = recipe(folder, sizes={"full": {}, "uneven": uneven})
    written = train(plan, tmp_path / "out")
    model = ElasticModel.from_pretrained(written)
    assert model.sizes["uneven"].config == uneven
    assert model["uneven"](token_ids()).logits.shape == (2, 13, 64)
    with pytest.raises(ValueError, match="cannot express moe_intermediate_size per layer"):
        slice_checkpoint(Checkpoint.open(written), tmp_path / "slice", "uneven")
    assert not (tmp_path / "slice").exists()


def test_a_mix_of_corpora_by_stage(folder: Path, tmp_path: Path) -> None:
    corpora = {n: {"path": str(folder / f"{n}.jsonl"), "weight": 1.0} for n in ("data", "more")}
    stage = {"steps": 2, "sequence_length": 24, "rows": 2}
    stages = [stage, stage | {"sequence_length": 48, "rows": 1, "mix": {"more": 1.0, "data": 0.0}}]
    plan = recipe(
        folder,
        data={"train": corpora, "heldout": str(folder / "data.jsonl")},
        train={"stages": stages},
    )
    tokenizer = letters_tokenizer()
    first, second = (streams(plan, tokenizer)(number) for number in (0, 1))
    signs = [set(tokenizer.convert_tokens_to_ids(["+", "-"]))] * 2
    seen = [set(next(each).input_ids.flatten().tolist()) for each in (first, second)]
    assert len(seen[0] & signs[0]) == 2 and len(seen[1] & signs[1]) == 1
    assert next(first).input_ids.shape == (2, 24) and next(second).input_ids.shape == (1, 48)
    whole = train(plan, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(plan, tmp_path / "out", callbacks=[Heard(stop=3)])
    same(stored(train(plan, tmp_path / "out", resume=True)), stored(whole))
    assert [line["stage"] for line in logged(tmp_path / "out")] == [0, 0, 1, 1]


def test_a_run_that_diverges_keeps_its_state(folder: Path, tmp_path: Path) -> None:
    stage = {"steps": 4, "sequence_length": 24, "rows": 2, "warmup_steps": 0}
    plan = recipe(folder, train={"stages": [stage | {"learning_rate": 1e37}]})
    heard = Heard()
    with pytest.raises(DivergedError, match=r"step 2 .* at size \w+, micro-batch 1; the state"):
        train(plan, tmp_path / "out", callbacks=[heard])
    assert heard.events == ["begin 0 recipe", "step 1", "save 1", "end"]
    assert [path.name for path in (tmp_path / "out" / "state").iterdir()] == ["step-00000001"]
    assert not (tmp_path / "out" / "elastic").exists() and len(logged(tmp_path / "out")) == 1


@pytest.mark.skipif(find_spec("wandb") is not None, reason="it is installed")
def test_a_listener_that_is_not_installed_is_told_at_once(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="report_to: wandb is not installed"):
        train(recipe(folder, report_to=["wandb"]), tmp_path / "out")
    assert not (tmp_path / "out" / "sorted").exists()


def test_metrics_go_on_after_the_saved_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')  # killed amid a line
    JsonLines(path).on_train_begin(2, {})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    JsonLines(path).on_train_begin(0, {})
    assert path.read_text() == ""


def test_a_parent_from_nothing(folder: Path, tmp_path: Path) -> None:
    config = Checkpoint.open(folder / "parent").config.to_dict()
    config["time_step_limit"] = [0.0, 3e38]
    init = {"config": config, "tokenizer": str(folder / "parent")}
    written = train(recipe(folder, parent=None, init=init, sizes={}), tmp_path / "out")
    assert written == tmp_path / "out" / "parent"
    opened = Checkpoint.open(written)
    assert not opened.is_elastic
    assert opened.config.hidden_size == 32
    assert (written / "tokenizer_config.json").is_file()


def test_the_baseline_is_trained_alone_from_nothing(folder: Path) -> None:
    heard = Heard()
    model = train_alone(recipe(folder), WIDTHS, [heard])
    assert heard.events == [f"step {n}" for n in range(1, 9)]
    layout = Layout(elastic("nemotron_h").layout.config)
    assert model.layout.count() == layout.count(layout.sizes_of(WIDTHS))
    again = train_alone(recipe(folder), WIDTHS)
    same(again.state, model.state)
