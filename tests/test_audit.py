"""Elastic or not: measured on a parent that knows its text."""

import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from models import elastic, letters_tokenizer
from typer.testing import CliRunner

from star_elastic.audit import KEEPS, Finding, audit, unigram_entropy
from star_elastic.cli import build_app
from star_elastic.model import ElasticModel
from star_elastic.records import Record
from star_elastic.submodel import ElasticSpace

TEXTS = ["abcabcabcabcabcabc", "bcabcabcabca", "cabcabcabcabcabcabcabc"]
RECORDS = [Record("", text, "t", "") for text in TEXTS]


@pytest.fixture(scope="module")
def taught() -> ElasticModel:
    """A parent that knows what comes after what; its small size was never taught."""
    model = elastic("llama")
    model.tokenizer = letters_tokenizer()
    parent = model.parent.train()
    optimizer = torch.optim.AdamW(parent.parameters(), lr=1e-2)
    ids = model.tokenizer(TEXTS[0], return_tensors="pt", add_special_tokens=False)["input_ids"]
    for _ in range(60):
        parent(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    parent.eval()
    return model


def test_what_was_never_trained_is_told(taught: ElasticModel) -> None:
    full, small, _ = audit(taught, RECORDS)
    assert full.size.name == "full" and full.kept == pytest.approx(1) and not full.warning
    assert small.kept < KEEPS
    assert "not elastic at this size" in small.warning


def test_a_size_that_claims_training_is_held_to_it(taught: ElasticModel) -> None:
    small = taught.sizes["small"]
    assert (
        "though it is declared trained"
        in Finding(small.model_copy(update={"trained": True}), 9.0, 0.2).warning
    )
    assert Finding(small.model_copy(update={"trained": True}), 0.1, 0.97).warning == ""
    assert (
        "never trained, and yet it keeps 97 %"
        in Finding(small.model_copy(update={"trained": False}), 0.1, 0.97).warning
    )


def test_the_floor_is_the_entropy_of_token_frequencies() -> None:
    tokenizer = letters_tokenizer()
    counts = Counter("".join(TEXTS)) | Counter()
    ends = len(TEXTS)  # every text ends with a token of its own
    total = counts.total() - len(TEXTS) + ends  # nothing predicts a first token
    first = Counter(text[0] for text in TEXTS)
    shares = [(counts[c] - first[c]) / total for c in counts] + [ends / total]
    expected = -sum(share * math.log(share) for share in shares)
    assert unigram_entropy(tokenizer, RECORDS, 512) == pytest.approx(expected)


def test_a_parent_that_knows_nothing_cannot_be_audited() -> None:
    model = elastic("llama")
    model.tokenizer = letters_tokenizer()
    with pytest.raises(ValueError, match="no better than token frequencies"):
        audit(model, RECORDS)
    with pytest.raises(ValueError, match="no token to predict"):
        audit(model, [])


def test_the_verb_warns(taught: ElasticModel, tmp_path: Path) -> None:
    space = ElasticSpace.of(
        taught.layout, {name: size.config for name, size in taught.sizes.items()}
    )
    taught.space = space
    taught.save_pretrained(tmp_path / "e")
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    words = ["audit", str(tmp_path / "e"), "--data", str(tmp_path / "data.jsonl")]
    done = CliRunner().invoke(build_app(), words)
    assert done.exit_code == 0, done.exception
    assert "small: not elastic at this size: keeps" in " ".join(done.stderr.split())
    rows = json.loads(CliRunner().invoke(build_app(), [*words, "--json"]).stdout)
    assert [row["name"] for row in rows] == [*taught.sizes]
    assert rows[1]["kept"] < KEEPS and rows[0]["kept"] == pytest.approx(1)
