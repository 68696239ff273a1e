"""Measured quality against the stock loss and stock generation, one record at a time."""

import json
from collections import defaultdict
from typing import Any

import pytest
import torch
from models import FAMILIES, elastic, letters_tokenizer, tiny
from transformers import PreTrainedModel

from star_elastic.evaluate import answers, evaluate, evaluate_size, mean, with_quality
from star_elastic.records import Record, final_answer, prompt_text

TEXTS = ["a", "3+4=", "hello, world", "12*12 =", "q", "what is it?", "((1))", "zz top", "9-", "no"]
RECORDS = [
    Record(prompt, completion, ("sum", "talk")[n % 2], completion)
    for n, (prompt, completion) in enumerate(zip(TEXTS, reversed(TEXTS), strict=True))
]


def tokens(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@torch.no_grad()
def stock_nll(model: PreTrainedModel, tokenizer: Any, records: list[Record]) -> dict[str, float]:
    """Mean stock loss of completion tokens and the end, one record a time."""
    totals: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    for record in records:
        prompt = tokens(tokenizer, prompt_text(tokenizer, record.prompt))
        ids = [*prompt, *tokens(tokenizer, record.completion), tokenizer.eos_token_id]
        labels = torch.tensor([[-100] * max(1, len(prompt)) + ids[max(1, len(prompt)) :]])
        loss = model(input_ids=torch.tensor([ids]), labels=labels, use_cache=False).loss
        counted = int((labels != -100).sum())
        totals[record.task] += loss.item() * counted
        counts[record.task] += counted
    return {task: totals[task] / counts[task] for task in totals}


@torch.no_grad()
def one_by_one(model: PreTrainedModel, tokenizer: Any, prompt: str, new: int) -> str:
    """A greedy answer without batch, padding or cache."""
    ids = tokens(tokenizer, prompt_text(tokenizer, prompt))
    start = len(ids)
    for _ in range(new):
        said = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        ids.append(int(said.argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chat", [False, True])
def test_nll_is_the_stock_loss(family: str, chat: bool) -> None:
    model, tokenizer = tiny(family), letters_tokenizer(chat)
    records = [*RECORDS, Record("", "plain text", "talk", "")]
    found = evaluate_size(model, tokenizer, records, generate=False)
    expected = stock_nll(model, tokenizer, records)
    assert found.keys() == expected.keys() == {"sum", "talk"}
    for task, quality in found.items():
        assert quality == {"nll": pytest.approx(expected[task], rel=1e-4)}


def test_nll_counts_no_more_than_the_longest_allowed() -> None:
    model, tokenizer = tiny("llama"), letters_tokenizer()
    whole = [Record("abc", "defghijk", "t", "")]
    found = evaluate_size(model, tokenizer, whole, max_length=6, generate=False)
    ids = torch.tensor([tokens(tokenizer, "abcdef")])
    labels = ids.masked_fill(torch.arange(6) < 3, -100)
    with torch.no_grad():
        expected = model(input_ids=ids, labels=labels).loss.item()
    assert found["t"]["nll"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_size", [4, 128])
def test_answers_are_those_given_one_by_one(family: str, batch_size: int) -> None:
    model, tokenizer = tiny(family), letters_tokenizer()
    found = dict(answers(model, tokenizer, RECORDS, 6, batch_size))
    assert found.keys() == set(RECORDS)
    for record, text in found.items():
        assert text == one_by_one(model, tokenizer, record.prompt, 6), record


@pytest.mark.parametrize("family", FAMILIES)
def test_chat_answers_are_those_given_one_by_one(family: str) -> None:
    model, tokenizer = tiny(family), letters_tokenizer(chat=True)
    for record, text in answers(model, tokenizer, RECORDS, 4):
        assert text == one_by_one(model, tokenizer, record.prompt, 4), record


def test_accuracy_is_the_share_of_right_answers() -> None:
    model, tokenizer = tiny("llama"), letters_tokenizer()
    said = [final_answer(one_by_one(model, tokenizer, r.prompt, 5)) for r in RECORDS]
    records = [
        Record(r.prompt, r.completion, r.task, text if n < 4 else "never said")
        for n, (r, text) in enumerate(zip(RECORDS, said, strict=True))
    ]
    found = evaluate_size(model, tokenizer, records, max_new_tokens=5)
    assert {task: quality["accuracy"] for task, quality in found.items()} == {
        "sum": 0.4,
        "talk": 0.4,
    }
    assert mean(found) == pytest.approx(0.4)


def test_records_without_a_prompt_are_not_asked() -> None:
    found = evaluate_size(tiny("llama"), letters_tokenizer(), [Record("", "abc", "t", "abc")])
    assert found["t"].keys() == {"nll"}
    assert mean(found) is None


def test_every_size_is_measured_on_its_own() -> None:
    model = elastic("nemotron_h")
    model.tokenizer = letters_tokenizer()
    seen: dict[str, Any] = {}
    found = evaluate(model, RECORDS, generate=False, on_size=seen.__setitem__)
    assert seen == found
    for size in ("full", "small", "prefix"):
        expected = stock_nll(model[size], model.tokenizer, RECORDS)
        assert found[size]["sum"]["nll"] == pytest.approx(expected["sum"], rel=1e-4)
    assert len({found[size]["sum"]["nll"] for size in found}) == 3


def test_quality_is_declared() -> None:
    model = elastic("llama")
    quality = {"sum": {"nll": 1.5, "accuracy": 0.25}}
    space = with_quality(model.space, {"small": quality})
    assert space.sizes["small"].quality == quality
    assert space.sizes["full"].quality == {}
    assert type(space).model_validate_json(space.model_dump_json()) == space
    assert json.loads(space.model_dump_json())["submodels"][1]["quality"] == quality
    assert model.space.sizes["small"].quality == {}
