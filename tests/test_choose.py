"""`star-elastic slice`: any size by name, fields or budget, aligned, with reasons."""

import json
import shutil
from pathlib import Path

import pytest
from models import SMALL, elastic, letters_tokenizer, same
from typer.testing import CliRunner, Result

from star_elastic.checkpoint import Checkpoint
from star_elastic.cli import build_app
from star_elastic.model import ElasticModel
from star_elastic.submodel import Training

WIDE = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "head_dim": 16}
WIDE |= {"num_key_value_heads": 2}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = elastic("llama")
    model.tokenizer = letters_tokenizer()
    training = Training(recipe="r", steps=1, tokens=1)
    model.space = model.space.model_copy(update={"training": training})
    folder = tmp_path_factory.mktemp("choose") / "m"
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "m"))


def cut(*words: object) -> Result:
    return CliRunner().invoke(build_app(), ["slice", *map(str, words)])


def fine(*words: object) -> Result:
    done = cut(*words)
    assert done.exit_code == 0, done.exception
    return done


def complaint(*words: object) -> str:
    done = cut(*words)
    assert isinstance(done.exception, ValueError), done.stdout
    return str(done.exception)


def test_every_size_in_one_go(folder: Path, tmp_path: Path) -> None:
    fine(folder, "--size", "all", "--out", tmp_path / "cut/{size}")
    opened = Checkpoint.open(folder)
    for name, size in opened.space.sizes.items():
        expected = dict(opened.tensors(opened.layout.sizes_of(size.config)))
        same(dict(Checkpoint.open(tmp_path / "cut" / name).tensors()), expected)


def test_several_sizes_want_several_folders(folder: Path, tmp_path: Path) -> None:
    words = (folder, "--size", "small", "--size", "full", "--out", tmp_path / "cut")
    assert "several sizes want a folder each, such as" in complaint(*words)


def test_a_budget_is_met_and_said_why(folder: Path, tmp_path: Path) -> None:
    sizes = Checkpoint.open(folder).space.sizes
    budget = (sizes["small"].total_params + sizes["full"].total_params) // 2
    done = fine(folder, "--params", budget, "--out", tmp_path / "cut")
    told = " ".join(done.stderr.split())
    assert "chosen: between, the largest within the budget, on the line between" in told
    assert f"within {budget:,} parameters" in told and "small" in told
    found = Checkpoint.open(tmp_path / "cut").layout.count()
    assert sizes["small"].total_params < found <= budget
    assert f"{found:,} parameters" in done.stdout


def test_memory_counts_context_and_batch(folder: Path, tmp_path: Path) -> None:
    layout = Checkpoint.open(folder).layout
    whole = layout.memory(2048, 3, layout.sizes, "float32")
    words = ("--memory", f"{0.8 * whole:.0f}B", "--context", "2k", "--batch", 3)
    fine(folder, *words, "--out", tmp_path / "cut")
    cut_layout = Checkpoint.open(tmp_path / "cut").layout
    assert cut_layout.memory(2048, 3, dtype="float32") <= 0.8 * whole


def test_a_budget_that_hardly_exceeds_a_named_size_takes_that(folder: Path, tmp_path: Path) -> None:
    small = Checkpoint.open(folder).space.sizes["small"]
    done = fine(folder, "--params", round(small.total_params * 1.01), "--out", tmp_path / "cut")
    assert "chosen: small, the largest named size within the budget" in " ".join(
        done.stderr.split()
    )
    assert Checkpoint.open(tmp_path / "cut").layout.count() == small.total_params


def test_a_budget_nobody_can_meet(folder: Path, tmp_path: Path) -> None:
    text = complaint(folder, "--params", "5", "--out", tmp_path / "cut")
    assert "budget 5 parameters" in text and "even the smallest size takes" in text
    assert not (tmp_path / "cut").exists()


def test_a_budget_is_aligned(tmp_path: Path) -> None:
    model = elastic("llama", **WIDE)
    model.save_pretrained(tmp_path / "m")
    layout = model.layout
    low = layout.count(layout.sizes_of(model.sizes["small"].config))
    budget = (low + layout.count()) // 2
    with_align = ("--align", 16, "--tensor-parallel", 2)
    fine(tmp_path / "m", "--params", budget, *with_align, "--out", tmp_path / "cut")
    config = json.loads((tmp_path / "cut/config.json").read_text())
    assert config["hidden_size"] % 16 == 0 and config["intermediate_size"] % 32 == 0
    assert config["num_attention_heads"] % 2 == 0
    assert Checkpoint.open(tmp_path / "cut").layout.count() <= budget


def test_a_size_that_the_target_cannot_use_is_refused(folder: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "cut")
    width = SMALL["llama"]["hidden_size"]
    named = complaint(folder, "--size", "small", "--align", "gguf", *out)
    assert f"hidden_size = {width}: " in named and "is not a multiple of 256" in named
    by_field = complaint(folder, "--set", "intermediate_size=20", "--align", 16, *out)
    assert "intermediate_size = 20: the input of mlp.down_proj.weight, 20" in by_field
    assert not (tmp_path / "cut").exists()


def test_fields_make_any_size(folder: Path, tmp_path: Path) -> None:
    fields = ("--set", "hidden_size=16", "--set", "intermediate_size=20")
    fine(folder, *fields, "--out", tmp_path / "cut")
    model = ElasticModel.from_pretrained(folder)
    view = model.narrowed({"hidden_size": 16, "intermediate_size": 20})
    same(ElasticModel.from_pretrained(tmp_path / "cut").state, view)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ((), "say one of --size, --set, --params, --active and --memory"),
        (("--size", "small", "--params", "1k"), "say one of --size, --set"),
        (("--params", "1k", "--active", "1k"), "say one of --size, --set"),
        (("--set", "hidden_size=8", "--set", "hidden_size=16"), "--set hidden_size: said twice"),
        (("--set", "hidden_size=wide"), "--set hidden_size=wide: not of the form field=number"),
        (("--set", "vocab_size=8"), "vocab_size is no axis of this llama model"),
        (("--size", "huge"), "no size 'huge'; there are full, small"),
        (("--memory", "24"), "--memory 24: not a number of memory"),
        (("--size", "small", "--max-shard-size", "5 parsecs"), "--max-shard-size 5 parsecs"),
        (("--size", "small", "--align", "nvfp9"), "--align nvfp9: "),
    ],
)
def test_bad_words_are_one_line(
    folder: Path, tmp_path: Path, words: tuple[str, ...], text: str
) -> None:
    assert text in complaint(folder, *words, "--out", tmp_path / "cut")
    assert not (tmp_path / "cut").exists()
