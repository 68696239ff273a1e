"""`star-elastic fit`, driven as a user drives it, on a tiny elastic folder."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from command import cli
from models import SMALL, elastic, letters_tokenizer
from typer.testing import CliRunner, Result

from star_elastic import card
from star_elastic.budget import Metric
from star_elastic.checkpoint import Checkpoint, declare
from star_elastic.cli import build_app
from star_elastic.model import ElasticModel
from star_elastic.records import read_records
from star_elastic.search import calibration_loss
from star_elastic.submodel import Training
from star_elastic.train.recipe import Routing
from star_elastic.train.router import Router, save_router, warm_up

ROWS = [
    {"prompt": "1+1=", "completion": "2"},
    {"prompt": "2+3=", "completion": "5"},
    {"text": "the cat sat on the mat"},
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An elastic folder that says it was trained, and records beside it."""
    folder = tmp_path_factory.mktemp("fit")
    model = elastic("llama")
    model.tokenizer = letters_tokenizer()
    training = Training(recipe="r", steps=1, tokens=1)
    model.space = model.space.model_copy(update={"training": training})
    model.save_pretrained(folder / "m")
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "fit"))


def run(*words: object) -> Result:
    return CliRunner().invoke(build_app(), [str(word) for word in words])


def answer(*words: object) -> dict[str, Any]:
    done = run(*words, "--json")
    assert done.exit_code == 0, done.exception
    return json.loads(done.stdout)


def half(folder: Path) -> int:
    """Parameters half-way between the small size and the parent."""
    sizes = Checkpoint.open(folder / "m").space.sizes
    return (sizes["small"].total_params + sizes["full"].total_params) // 2


def test_without_data_it_goes_between_named_sizes(folder: Path) -> None:
    budget = half(folder)
    found = answer("fit", folder / "m", "--params", budget)
    between = next(each for each in found["candidates"] if each["name"] == "between")
    assert found["best"] == "between" and between["loss"] is None
    assert found["size"]["total_params"] == between["cost"] <= budget
    assert found["size"]["config"] == between["fields"] != SMALL["llama"]
    named = {each["name"] for each in found["candidates"]} - {"between"}
    assert named == {"small", "prefix"}
    table = run("fit", folder / "m", "--params", budget).stdout
    assert "not measured" in table and card.BETWEEN[:20] in table


def test_at_a_named_size_it_is_that_size(folder: Path) -> None:
    small = Checkpoint.open(folder / "m").space.sizes["small"]
    found = answer("fit", folder / "m", "--active", small.active_params)
    assert found["best"] == "small" and found["size"]["config"] == small.config
    assert found["size"]["trained"] is True


def test_with_data_the_lowest_measured_loss_wins_and_can_be_kept(folder: Path) -> None:
    budget, data = half(folder), folder / "data.jsonl"
    words = ["--data", data, "--evaluations", 20, "--multiple-of", "hidden_size=4"]
    found = answer("fit", folder / "m", "--params", budget, *words, "--store", "new")
    losses = {each["name"]: each["loss"] for each in found["candidates"]}
    assert {"small", "between", "search"} <= losses.keys()
    assert losses[found["best"]] == min(losses.values())
    model = ElasticModel.from_pretrained(folder / "m")
    stored = model.sizes["new"]
    assert stored.config == found["size"]["config"] and stored.total_params <= budget
    loss = calibration_loss(model, read_records(data))(stored.config)
    assert stored.quality == {"calibration": {"nll": pytest.approx(loss, rel=1e-5)}}
    assert model.space.training is not None
    listed = run("inspect", folder / "m").stdout
    assert "new" in listed and "small" in listed
    if not stored.trained:
        assert "between trained sizes" in " ".join(listed.split())
        assert card.BETWEEN in (folder / "m/README.md").read_text()


def test_a_size_between_is_stored_untrained_and_slices_with_a_warning(folder: Path) -> None:
    answer("fit", folder / "m", "--params", half(folder), "--store", "between")
    size = Checkpoint.open(folder / "m").space.sizes["between"]
    assert not size.trained and size.quality == {}
    done = run("slice", folder / "m", "--size", "between", "--out", folder / "cut")
    assert "between trained sizes" in " ".join(done.stderr.split())
    again = run("slice", folder / "m", "--set", "intermediate_size=20", "--out", folder / "cut2")
    assert "between trained sizes" in " ".join(again.stderr.split())


def test_untrained_checkpoints_keep_their_own_sentence(folder: Path) -> None:
    opened = Checkpoint.open(folder / "m")
    small = opened.space.sizes["small"].model_copy(update={"trained": False})
    assert card.warning(small, opened.space) == card.BETWEEN
    space = opened.space.model_copy(update={"training": None, "submodels": [small]})
    assert card.warning(small, space) == card.UNTRAINED
    declare(opened, space)
    assert "never trained: not elastic" in " ".join(run("inspect", folder / "m").stdout.split())


def test_a_budget_of_memory_counts_context_and_batch(folder: Path) -> None:
    opened = Checkpoint.open(folder / "m")
    found = answer("fit", folder / "m", "--memory", "1GiB", "--context", "1k", "--batch", 2)
    assert found["metric"] == "memory at context 1024, batch 2, float32"
    layout = opened.layout
    full = layout.memory(1024, 2, layout.sizes, "float32")
    assert found["best"] == "full" and found["candidates"][0]["cost"] == full
    tight = answer("fit", folder / "m", "--memory", f"{full - 1}B", "--context", "1k", "--batch", 2)
    assert tight["best"] == "between" and tight["size"]["total_params"] < layout.count()


def test_latency_is_measured_kept_and_read_again(folder: Path) -> None:
    table = folder / "latency.json"
    words = ["fit", folder / "m", "--latency-ms", 10_000, "--context", 8, "--latency-table", table]
    first = run(*words, "--json")
    assert json.loads(first.stdout)["best"] == "full", first.stderr
    assert "latency measured" in first.stderr and table.is_file()
    again = run(*words, "--json")
    assert "latency read from" in again.stderr
    assert json.loads(again.stdout)["candidates"] == json.loads(first.stdout)["candidates"]


def test_the_router_beside_the_weights_is_asked(folder: Path) -> None:
    layout = Checkpoint.open(folder / "m").layout
    axes = {"intermediate_size": [4, 8, 12, 16, 20, 24], "num_hidden_layers": [1, 2]}
    routing, metric = Routing(axes=axes, metric="params"), Metric(kind="params")
    router = Router(layout, routing, metric, [1.0, 0.6])
    warm_up(router)
    save_router(router, folder / "m/router.safetensors")
    whole = layout.count()
    budget = round(0.65 * whole)
    found = answer("fit", folder / "m", "--params", budget)
    fields = router.fields(budget / whole)
    assert found["best"] == "router" and found["size"]["config"] == fields != {}
    assert found["size"]["total_params"] == layout.count(layout.sizes_of(fields)) <= budget
    tight = run("fit", folder / "m", "--params", round(0.5 * whole))
    assert "router.safetensors: passed over, its choice costs" in tight.stderr
    done = run("fit", folder / "m", "--active", whole)
    assert "router.safetensors: passed over, it counts total parameters" in done.stderr


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "say one of --params, --active, --memory and --latency-ms"),
        (["--params", "1B", "--active", "1B"], "say one of --params"),
        (["--params", "17Q"], "--params 17Q: not a number of parameters"),
        (["--memory", "24"], "--memory 24: not a number of memory"),
        (["--params", "10"], "budget 10 parameters (total parameters): even the smallest size"),
        (["--params", "1B", "--axes", "vocab_size"], "--axes vocab_size: not one of those"),
        (["--params", "1B", "--multiple-of", "hidden_size"], "--multiple-of hidden_size: not of"),
        (["--params", "1B", "--multiple-of", "hidden_size=0"], "not a positive step"),
        (["--params", "1B", "--store", "small"], "--store small: "),
        (["--params", "1B", "--store", "a b"], "--store a b: "),
        (["--memory", "1GB", "--context", "long"], "--context long: not a number of tokens"),
    ],
)
def test_bad_input_is_one_line(made: Path, words: list[str], complaint: str) -> None:
    done = run("fit", made / "m", *words)
    assert isinstance(done.exception, ValueError)
    assert complaint in str(done.exception) and "\n" not in str(done.exception)


def test_the_command_ends_with_one_line_and_no_traceback(made: Path) -> None:
    done = cli("fit", made / "m", "--params", 10, check=False)
    assert done.returncode == 1 and done.stderr.startswith("error: budget 10 parameters")
    assert done.stderr.count("\n") == 1
