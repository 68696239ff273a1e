"""`star-elastic rank`, driven as a user drives it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command import cli
from folders import stock_load
from models import letters_tokenizer, logits, same, tiny, token_ids
from safetensors.torch import load_file

from star_elastic import rank, tensors
from star_elastic.checkpoint import Checkpoint
from star_elastic.cli import build_app
from star_elastic.model import ElasticModel


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rank")
    model = ElasticModel(tiny("nemotron_h", hybrid_override_pattern="M*ME-E"))
    tokenizer = letters_tokenizer()
    tensors.write(folder / "parent", model.state, model.layout, None, tokenizer=tokenizer)
    rows = [{"prompt": f"{n}+{n}=", "completion": str(2 * n)} for n in range(40)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "parent"


def verb(*words: object) -> None:
    """`star-elastic rank` in this process; errors come as `main` sees them."""
    build_app()(["rank", *map(str, words)], standalone_mode=False)


def test_the_verb_end_to_end(parent: Path, tmp_path: Path) -> None:
    words = ["rank", parent, "--out", tmp_path / "a", "--data", parent.parent / "data.jsonl"]
    done = cli(*words, "--samples", 8, "--max-length", 16, "--depth", "--one-block")
    assert "by importance on 8 samples" in done.stdout and "not trained" in done.stderr
    first = Checkpoint.open(tmp_path / "a")
    line = next(li for li in done.stdout.splitlines() if li.startswith("layers, best first: "))
    assert [int(n) for n in line.split(": ")[1].split()] == first.layout.layer_order
    found = logits(stock_load(tmp_path / "a"), token_ids())
    expected = logits(stock_load(parent), token_ids())
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_the_verb_reuses_scores(parent: Path, tmp_path: Path) -> None:
    data = ["--data", parent.parent / "data.jsonl", "--samples", 8, "--max-length", 16, "--depth"]
    verb(parent, *data, "--out", tmp_path / "a")
    scores = tmp_path / "a" / "scores.safetensors"
    verb(parent, "--scores", scores, "--out", tmp_path / "b")
    verb(parent, "--scores", scores, "--depth", "--min-layers", 5, "--out", tmp_path / "c")
    first, second, third = (Checkpoint.open(tmp_path / name) for name in "abc")
    assert second.layout.layer_order is None
    same(dict(second.tensors()), dict(first.tensors()))
    same(load_file(tmp_path / "b" / "scores.safetensors"), load_file(scores))
    raw = rank.load_scores(scores, first.layout)
    assert raw.depth is not None
    assert third.layout.layer_order == rank.layer_order(first.layout, raw.depth, 5)


def test_one_block_at_a_time_writes_the_same_folder(parent: Path, tmp_path: Path) -> None:
    data = ["--data", parent.parent / "data.jsonl", "--samples", 8, "--depth"]
    verb(parent, *data, "--out", tmp_path / "a")
    verb(parent, *data, "--out", tmp_path / "b", "--one-block")
    first, second = (Checkpoint.open(tmp_path / name) for name in "ab")
    same(dict(first.tensors()), dict(second.tensors()))
    assert first.space == second.space
    same(*(load_file(tmp_path / name / "scores.safetensors") for name in "ab"))


def test_the_verb_orders_at_random(parent: Path, tmp_path: Path, capsys: Any) -> None:
    verb(parent, "--order", "random", "--seed", 5, "--depth", "--out", tmp_path / "out")
    assert "in random order (seed 5)" in capsys.readouterr().out
    found = Checkpoint.open(tmp_path / "out")
    orders, layers = rank.random_order(Checkpoint.open(parent).layout, 5)
    assert found.layout.layer_order == layers
    assert not (tmp_path / "out" / "scores.safetensors").exists()
    before = dict(Checkpoint.open(parent).tensors())["backbone.embeddings.weight"]
    after = dict(found.tensors())["backbone.embeddings.weight"]
    assert torch.equal(after, before[:, orders[None, "hidden_size"]])


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "say --data, --scores, or --order random"),
        (["--data", "absent.jsonl"], "absent.jsonl"),
        (["--scores", "absent.safetensors"], "absent.safetensors: not readable"),
        (["--data", "x.jsonl", "--device", "abacus"], "--device abacus: "),
    ],
)
def test_the_verb_refuses_in_one_line(
    words: list[str], named: str, parent: Path, tmp_path: Path
) -> None:
    with pytest.raises((ValueError, OSError)) as error:
        verb(parent, *words, "--out", tmp_path / "out")
    assert named in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_the_verb_does_not_measure_what_it_cannot_write(parent: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="choose another --out"):
        verb(parent, "--data", "absent.jsonl", "--out", tmp_path / "out")


def test_scores_without_depth_order_no_layers(parent: Path, tmp_path: Path) -> None:
    data = ["--data", parent.parent / "data.jsonl", "--samples", 8]
    verb(parent, *data, "--out", tmp_path / "a")
    path = tmp_path / "a" / "scores.safetensors"
    with pytest.raises(ValueError, match="--depth: these scores rank no layers"):
        verb(parent, "--scores", path, "--depth", "--out", tmp_path / "out")
