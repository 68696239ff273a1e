"""A whole run of a recipe: what it writes, and that stopping it changes nothing (I8)."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from models import SMALL, elastic, letters_tokenizer, logits, same, tiny, token_ids
from torch import Tensor

from star_elastic.checkpoint import Checkpoint
from star_elastic.model import ElasticModel
from star_elastic.train.baselines import train_alone
from star_elastic.train.recipe import Recipe, load_recipe
from star_elastic.train.run import train
from star_elastic.train.trainer import StepReport


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """A recipe whose parent, tokenizer and data are made on the spot."""
    parent = tmp_path / "parent"
    tiny("nemotron_h").save_pretrained(parent)
    letters_tokenizer().save_pretrained(parent)
    rows = [{"prompt": f"{n}+{n}=", "completion": str(2 * n), "task": "sum"} for n in range(40)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "parent": str(parent),
        "data": {"train": str(data), "heldout": str(data)},
        "sizes": {"full": {}, "small": SMALL["nemotron_h"], "prefix": {"hidden_size": 16}},
        "multiple_of": {"hidden_size": 8},
        "rank": {"samples": 16},
        "train": {"steps": 8, "tokens": 64, "warmup_steps": 2, "accumulate": 2, "save_every": 3}
        | {"learning_rate": 3e-3, "balance_rate": 0.01},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    return load_recipe(tmp_path / "recipe.yaml")


def stored(folder: Path) -> dict[str, Tensor]:
    return dict(Checkpoint.open(folder).tensors())


def test_a_run_writes_what_it_says(recipe: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "out"
    seen: list[int] = []
    written = train(recipe, out, on_step=lambda report: seen.append(report.step))
    assert written == out / "elastic"
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == seen == [*range(1, 9)]
    before, after = Checkpoint.open(out / "sorted"), Checkpoint.open(written)
    untrained = {size.name for size in before.space.submodels if not size.trained}
    assert untrained == {"small", "prefix"}
    assert {size.trained for size in after.space.submodels} == {True}
    assert [*after.space.sizes] == ["full", "small", "prefix"]
    assert after.space.axes["hidden_size"].multiple_of == 8
    assert after.space.training is not None
    assert (after.space.training.recipe, after.space.training.steps) == ("recipe", 8)
    assert after.space.training.tokens == lines[-1]["tokens"]
    assert (written / "tokenizer_config.json").is_file()


def test_the_sorted_parent_says_what_the_parent_says(recipe: Recipe, tmp_path: Path) -> None:
    train(recipe, tmp_path / "out")
    ids = token_ids()
    found = ElasticModel.from_pretrained(tmp_path / "out" / "sorted").parent
    expected = ElasticModel.from_pretrained(str(recipe.parent)).parent
    torch.testing.assert_close(logits(found, ids), logits(expected, ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("stop", [1, 4, 8])
def test_an_interrupted_run_ends_like_one_that_was_not(
    recipe: Recipe, tmp_path: Path, stop: int
) -> None:
    whole = train(recipe, tmp_path / "whole")

    def press(report: StepReport) -> None:
        if report.step == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "out", on_step=press)
    assert not (tmp_path / "out" / "elastic").exists()
    again = train(recipe, tmp_path / "out", resume=True)
    same(stored(again), stored(whole))
    assert Checkpoint.open(again).space == Checkpoint.open(whole).space
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [*range(1, 9)]


def test_a_run_never_overwrites_another(recipe: Recipe, tmp_path: Path) -> None:
    train(recipe, tmp_path / "out")
    before = stored(tmp_path / "out" / "elastic")
    with pytest.raises(FileExistsError, match="holds a run already"):
        train(recipe, tmp_path / "out")
    same(stored(tmp_path / "out" / "elastic"), before)


def test_a_parent_from_nothing(recipe: Recipe, tmp_path: Path) -> None:
    parent = Checkpoint.open(str(recipe.parent))
    init = {"config": parent.config.to_dict(), "tokenizer": str(recipe.parent)}
    values = json.loads(recipe.model_dump_json()) | {"parent": None, "init": init, "sizes": {}}
    init["config"]["time_step_limit"] = [0.0, 3e38]
    fresh = Recipe.model_validate_json(json.dumps(values))
    written = train(fresh, tmp_path / "out")
    assert written == tmp_path / "out" / "parent"
    opened = Checkpoint.open(written)
    assert not opened.is_elastic
    assert opened.config.hidden_size == 32
    assert (written / "tokenizer_config.json").is_file()


def test_the_baseline_is_trained_alone_from_nothing(recipe: Recipe) -> None:
    reports: list[StepReport] = []
    fields = SMALL["nemotron_h"]
    model = train_alone(recipe, fields, reports.append)
    assert [report.step for report in reports] == [*range(1, 9)]
    assert {size for report in reports for size in report.sizes} == {"full"}
    elastic_sizes = elastic("nemotron_h").sizes
    assert model.layout.count() == elastic_sizes["small"].total_params
    again = train_alone(recipe, fields)
    same(again.state, model.state)
