"""A recipe's parent in nested order: what is declared, and that its function stays."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import SMALL, letters_tokenizer, logits, same, tiny, token_ids

from star_elastic import rank, stock
from star_elastic.model import ElasticModel
from star_elastic.records import Record
from star_elastic.train.recipe import Recipe
from star_elastic.train.sort import calibration, sorted_parent, write_sorted

WIDTHS = {field: n for field, n in SMALL["nemotron_h"].items() if field != "num_hidden_layers"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A parent whose layers can be removed, and two corpora."""
    folder = tmp_path_factory.mktemp("sort")
    tiny("nemotron_h", hybrid_override_pattern="M*ME-E").save_pretrained(folder / "parent")
    letters_tokenizer().save_pretrained(folder / "parent")
    for name, sign in (("plus", "+"), ("minus", "-")):
        rows = [{"prompt": f"{n}{sign}1=", "completion": str(n)} for n in range(10, 40)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines)
    return folder


def recipe(folder: Path, **changes: Any) -> Recipe:
    plus = f"{folder}/plus.jsonl"
    values: dict[str, Any] = {
        "parent": f"{folder}/parent",
        "data": {"train": plus, "heldout": plus},
        "sizes": {"full": {}, "small": WIDTHS},
        "rank": {"samples": 8},
        "train": {"stages": [{"steps": 1, "sequence_length": 16}]},
    }
    return Recipe.model_validate_json(json.dumps(values | changes))


def test_the_sorted_parent_declares_its_sizes_and_says_the_same(folder: Path) -> None:
    model = sorted_parent(recipe(folder))
    assert [*model.sizes] == ["full", "small"] and model.space.layer_order is None
    assert model.sizes["small"].config == WIDTHS and not model.sizes["small"].trained
    before = ElasticModel.from_pretrained(folder / "parent").parent
    found, expected = logits(model.parent, token_ids()), logits(before, token_ids())
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert not torch.equal(
        model.state["model.norm_f.weight"], before.model.norm_f.weight
    )  # something moved
    assert {type(m) for m in model.parent.modules()} == {type(m) for m in before.modules()}


@pytest.mark.parametrize("one_block", [False, True])
def test_the_folder_is_the_sorted_parent_with_its_scores(
    folder: Path, one_block: bool, tmp_path: Path
) -> None:
    plan = recipe(folder, rank={"samples": 8, "depth": True, "one_block": one_block})
    write_sorted(plan, tmp_path / "sorted")
    expected, found = sorted_parent(plan), ElasticModel.from_pretrained(tmp_path / "sorted")
    same(found.state, expected.state)
    assert found.space.model_copy(update={"digests": {}}) == expected.space
    assert found.tokenizer is not None
    raw = rank.load_scores(tmp_path / "sorted" / rank.SCORES, expected.layout)
    assert raw.samples == 8 and raw.depth is not None


@pytest.mark.parametrize("depth", [False, True])
def test_one_block_at_a_time_sorts_alike(folder: Path, depth: bool) -> None:
    whole = sorted_parent(recipe(folder, rank={"samples": 8, "depth": depth}))
    plan = {"samples": 8, "depth": depth, "one_block": True}
    found = sorted_parent(recipe(folder, rank=plan))
    same(found.state, whole.state)
    assert found.space == whole.space
    assert (found.layout.layer_order is not None) == depth


def test_ranked_layers_make_depth_an_axis(folder: Path, tmp_path: Path) -> None:
    sizes = {"full": {}, "less": {"num_hidden_layers": 4}}
    plan = {"samples": 8, "depth": True, "min_layers": 4}
    model = sorted_parent(recipe(folder, sizes=sizes, rank=plan))
    parent = stock.use_chunk_scan(ElasticModel.from_pretrained(folder / "parent").parent)
    blocks = rank.Blocks(parent)
    batches = calibration(recipe(folder, rank=plan), letters_tokenizer())
    errors = rank.layer_errors(blocks, batches, 4)
    assert model.space.layer_order == rank.layer_order(blocks.layout, errors, 4)
    model.save_pretrained(tmp_path / "sorted")
    again = ElasticModel.from_pretrained(tmp_path / "sorted")
    assert torch.equal(logits(again["less"], token_ids()), logits(model["less"], token_ids()))
    assert len(again["less"].model.layers) == 4


def test_depth_without_ranking_is_refused_before_the_pass(folder: Path) -> None:
    sizes = {"full": {}, "less": {"num_hidden_layers": 4}}
    data = {"train": "absent.jsonl", "heldout": "absent.jsonl"}  # never opened
    with pytest.raises(ValueError, match="num_hidden_layers: this model has no layer_order"):
        sorted_parent(recipe(folder, sizes=sizes, data=data))


def test_a_random_order_is_the_seeds(folder: Path) -> None:
    plan = {"samples": 8, "order": "random", "depth": True}
    model = sorted_parent(recipe(folder, rank=plan))
    before = ElasticModel.from_pretrained(folder / "parent")
    orders, layers = rank.random_order(before.layout, seed=0)
    rank.reorder(before.parent, orders)
    same(model.state, before.state)
    assert model.space.layer_order == layers


def test_heads_are_ranked_on_the_channels_that_the_smallest_size_keeps(folder: Path) -> None:
    sizes = {"full": {}, "thin": {"mamba_head_dim": 1}, "small": {"mamba_head_dim": 3}}
    model = sorted_parent(recipe(folder, sizes=sizes))
    before = ElasticModel.from_pretrained(folder / "parent")
    blocks = rank.Blocks(stock.use_chunk_scan(before.submodel()))
    raw = rank.measure(blocks, calibration(recipe(folder), before.tokenizer))
    scores = rank.scores_of(blocks.layout, raw, {"mamba_head_dim": 1})
    expected = before.state["model.layers.0.mixer.A_log"].view(2, 4)
    expected = expected.gather(1, rank.order(scores)[0, "mamba_heads"])
    assert torch.equal(model.state["model.layers.0.mixer.A_log"].view(2, 4), expected)


def test_each_corpus_has_its_share_of_the_sample(folder: Path) -> None:
    corpora = {
        "plus": {"path": f"{folder}/plus.jsonl", "weight": 3.0},
        "minus": {"path": f"{folder}/minus.jsonl"},
    }
    plan = recipe(folder, data={"train": corpora, "heldout": f"{folder}/plus.jsonl"})
    tokenizer = letters_tokenizer()
    texts = [
        tokenizer.decode(row[keep])
        for ids, mask in calibration(plan, tokenizer)
        for row, keep in zip(ids, mask, strict=True)
    ]
    assert [sum("+" in text for text in texts), sum("-" in text for text in texts)] == [6, 2]
    assert len(texts) == 8 and len(set(texts)) == 8


def test_records_are_cut_and_batches_bounded() -> None:
    tokenizer = letters_tokenizer()
    records = [Record("", "x" * 3000, "text", "") for _ in range(7)]
    batches = rank.calibration(tokenizer, records, samples=9, max_length=2500)
    assert [tuple(ids.shape) for ids, _ in batches] == [(3, 2500), (3, 2500), (1, 2500)]
    assert all(bool(mask.all()) for _, mask in batches)
    with pytest.raises(ValueError, match="none of 0 records has a token"):
        rank.calibration(tokenizer, [], samples=9, max_length=2500)
