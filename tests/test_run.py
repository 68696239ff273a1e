"""A whole run of a recipe: what it writes, and that stopping it changes nothing (I8)."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from models import SMALL, elastic, letters_tokenizer, logits, same, tiny, token_ids
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from star_elastic.checkpoint import Checkpoint
from star_elastic.folder import digest
from star_elastic.layout import Layout
from star_elastic.model import ElasticModel
from star_elastic.slicing import slice_checkpoint
from star_elastic.train.baselines import train_alone
from star_elastic.train.callbacks import Callback
from star_elastic.train.interrupt import Interrupted
from star_elastic.train.recipe import Recipe
from star_elastic.train.report import StepReport
from star_elastic.train.router import ROUTER, load_router
from star_elastic.train.run import train

WIDTHS = {field: n for field, n in SMALL["nemotron_h"].items() if field != "num_hidden_layers"}
AXES = {
    "hidden_size": [16, 24, 32],
    "moe_intermediate_size": [8, 16],
    "n_routed_experts": [4, 6],
    "num_hidden_layers": [5, 6],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A parent with its tokenizer, another of the same vocabulary, and data, made on the spot."""
    folder = tmp_path_factory.mktemp("run")
    for name, seed in (("parent", 0), ("other", 1)):
        tiny("nemotron_h", seed).save_pretrained(folder / name)
        letters_tokenizer().save_pretrained(folder / name)
    for name, sign in (("data", "+"), ("more", "-")):
        rows = [{"prompt": f"{n}{sign}{n}=", "completion": str(2 * n)} for n in range(40)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def recipe(folder: Path, **changes: Any) -> Recipe:
    data = str(folder / "data.jsonl")
    stage = {"steps": 8, "sequence_length": 24, "rows": 2, "accumulate": 2, "warmup_steps": 2}
    values = {
        "parent": str(folder / "parent"),
        "data": {"train": data, "heldout": data},
        "sizes": {"full": {}, "small": WIDTHS, "prefix": {"hidden_size": 16}},
        "multiple_of": {"hidden_size": 8},
        "rank": {"samples": 16},
        "balance": {"rate": 0.01},
        "train": {"stages": [stage | {"learning_rate": 3e-3}], "save_every": 3},
    }
    return Recipe.model_validate_json(json.dumps(values | changes))


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


def logged(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_run_writes_what_it_says(folder: Path, tmp_path: Path) -> None:
    out, heard, said = tmp_path / "out", Heard(), []
    written = train(recipe(folder), out, callbacks=[heard], say=said.append)
    assert written == out / "elastic"
    assert [line["step"] for line in logged(out)] == [*range(1, 9)]
    steps = [f"step {n}" for n in range(1, 9)]
    saves = {3: "save 3", 6: "save 6", 8: "save 8"}
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
        train(recipe(folder), out, callbacks=[Heard(stop=4)])
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
    assert len(board.Scalars("grad_norm")) == 8


def test_the_sorted_parent_says_what_the_parent_says(folder: Path, tmp_path: Path) -> None:
    train(recipe(folder), tmp_path / "out")
    ids = token_ids()
    found = ElasticModel.from_pretrained(tmp_path / "out" / "sorted").parent
    expected = ElasticModel.from_pretrained(folder / "parent").parent
    torch.testing.assert_close(logits(found, ids), logits(expected, ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("stop", [1, 4, 8])
def test_an_interrupted_run_ends_like_one_that_was_not(
    folder: Path, tmp_path: Path, stop: int
) -> None:
    whole = train(recipe(folder), tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(recipe(folder), tmp_path / "out", callbacks=[Heard(stop)])
    assert not (tmp_path / "out" / "elastic").exists()
    again = train(recipe(folder), tmp_path / "out", resume=True)
    same(stored(again), stored(whole))
    assert Checkpoint.open(again).space == Checkpoint.open(whole).space
    assert [line["step"] for line in logged(tmp_path / "out")] == [*range(1, 9)]


def test_a_run_never_overwrites_another(folder: Path, tmp_path: Path) -> None:
    train(recipe(folder), tmp_path / "out")
    before = stored(tmp_path / "out" / "elastic")
    with pytest.raises(FileExistsError, match="holds a run already"):
        train(recipe(folder), tmp_path / "out")
    same(stored(tmp_path / "out" / "elastic"), before)


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
    stages = [stage, stage | {"mix": {"more": 1.0}}]
    plan = recipe(
        folder,
        data={"train": corpora, "heldout": str(folder / "data.jsonl")},
        train={"stages": stages},
    )
    train(plan, tmp_path / "out")
    assert [line["stage"] for line in logged(tmp_path / "out")] == [0, 0, 1, 1]


def test_another_teacher_teaches(folder: Path, tmp_path: Path) -> None:
    other = {"teacher": str(folder / "other")}
    losses = [
        logged(train(recipe(folder, distil=distil), tmp_path / name).parent)[0]["losses"]
        for name, distil in (("own", {}), ("other", other))
    ]
    assert losses[0] != losses[1] and losses[0].keys() == losses[1].keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": 1.0}, "another teacher's hidden states are not the parent's"),
        ({"teacher": "wider"}, "vocabulary 80, the parent's is 64"),
        ({"teacher": "foreign"}, "has another tokenizer than the parent"),
    ],
)
def test_a_teacher_that_cannot_teach(
    folder: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    tiny("llama", vocab_size=80).save_pretrained(tmp_path / "wider")
    letters_tokenizer().save_pretrained(tmp_path / "wider")
    tiny("llama").save_pretrained(tmp_path / "foreign")
    foreign = letters_tokenizer()
    foreign.add_tokens(["new"])
    foreign.save_pretrained(tmp_path / "foreign")
    name = change.pop("teacher", None)
    teacher = str(tmp_path / name) if name else str(folder / "other")
    with pytest.raises(ValueError, match=message):
        train(recipe(folder, distil={"teacher": teacher, **change}), tmp_path / "out")


@pytest.mark.parametrize("distil", [{"cross_entropy": 1.0}, {"hidden": 1.0}, {"temperature": 3.0}])
def test_terms_of_the_loss(folder: Path, tmp_path: Path, distil: dict[str, float]) -> None:
    stage = {"steps": 1, "sequence_length": 24, "rows": 2, "size_probs": {"small": 1.0}}
    plain, other = (
        logged(train(recipe(folder, distil=d, train={"stages": [stage]}), tmp_path / n).parent)
        for n, d in (("plain", {}), ("other", distil))
    )
    assert other[0]["losses"]["small"] != plain[0]["losses"]["small"]


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
