"""JSONL records, their tokens, and padded batches."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import letters_tokenizer

from star_elastic.records import (
    Example,
    Record,
    collate,
    encode,
    final_answer,
    prompt_text,
    read_records,
)


def lines(path: Path, *values: Any) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


@pytest.mark.parametrize(
    ("value", "record"),
    [
        ({"text": "abc"}, Record("", "abc", "text", "abc")),
        ({"prompt": "1+1=", "completion": "2"}, Record("1+1=", "2", "text", "2")),
        (
            {"prompt": "p", "completion": "<think>x</think> 7", "task": "sum"},
            Record("p", "<think>x</think> 7", "sum", "7"),
        ),
        ({"prompt": "p", "completion": "c", "answer": "a"}, Record("p", "c", "text", "a")),
        (
            {"question": "how many?", "answer": "one and one\n#### 2"},
            Record("how many?", "one and one\n#### 2", "text", "2"),
        ),
    ],
)
def test_a_record(tmp_path: Path, value: dict[str, str], record: Record) -> None:
    assert read_records(lines(tmp_path / "a.jsonl", value)) == [record]


def test_empty_lines_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('\n{"text": "a"}\n\n{"text": "b"}\n')
    assert [r.completion for r in read_records(tmp_path / "a.jsonl")] == ["a", "b"]


@pytest.mark.parametrize(
    "bad",
    ["{", "[]", "1", '"text"', "{}", '{"prompt": "p"}', '{"text": 1}', '{"text": "a", "task": 1}']
    + ['{"question": "q"}', '{"question": "q", "answer": 1}', "null"],
)
def test_a_line_that_is_no_record_is_named(tmp_path: Path, bad: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' + bad + "\n")
    with pytest.raises(ValueError, match=r"a\.jsonl: line 2: not a record"):
        read_records(tmp_path / "a.jsonl")


def test_a_file_without_records_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"a\.jsonl: no records"):
        read_records(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("42", "42"),
        ("  42\n", "42"),
        ("<think>a</think>42", "42"),
        ("<think>a</think>b</think> c ", "c"),
        ("so\n#### 42", "42"),
        ("#### 1 </think> #### 2", "#### 2"),
        ("<think>never closed", "<think>never closed"),
    ],
)
def test_final_answer(text: str, answer: str) -> None:
    assert final_answer(text) == answer


def ids(text: str) -> list[int]:
    return letters_tokenizer()(text, add_special_tokens=False)["input_ids"]


def test_tokens_are_prompt_completion_and_end() -> None:
    tokenizer, records = letters_tokenizer(), [Record("ab=", "cd", "t", "")]
    (example,) = encode(tokenizer, records, 100, "completion")
    assert example == Example([*ids("ab=cd"), tokenizer.eos_token_id], 3)
    (example,) = encode(tokenizer, records, 100, "all")
    assert example == Example([*ids("ab=cd"), tokenizer.eos_token_id], 1)


def test_plain_text_learns_from_its_second_token() -> None:
    (example,) = encode(letters_tokenizer(), [Record("", "abc", "t", "")], 100, "completion")
    assert example.start == 1


@pytest.mark.parametrize("max_length", [1, 2, 3, 4, 5, 6, 7])
def test_examples_are_cut_to_the_longest_allowed(max_length: int) -> None:
    tokenizer = letters_tokenizer()
    (example,) = encode(tokenizer, [Record("ab=", "cd", "t", "")], max_length, "completion")
    assert example.ids == [*ids("ab=cd"), tokenizer.eos_token_id][:max_length]
    assert example.start == 3


def test_the_chat_template_renders_prompts() -> None:
    tokenizer = letters_tokenizer(chat=True)
    assert prompt_text(tokenizer, "ab") == ":ab="
    assert prompt_text(tokenizer, "") == ""
    assert prompt_text(letters_tokenizer(), "ab") == "ab"
    (example,) = encode(tokenizer, [Record("ab", "cd", "t", "")], 100, "completion")
    assert example == Example([*ids(":ab=cd"), tokenizer.eos_token_id], 4)


@st.composite
def examples(draw: st.DrawFn) -> list[Example]:
    token_lists = draw(
        st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=9), min_size=1, max_size=5)
    )
    return [Example(tokens, draw(st.integers(1, len(tokens)))) for tokens in token_lists]


@given(rows=examples(), pad=st.integers(0, 3))
def test_a_batch_holds_its_rows(rows: list[Example], pad: int) -> None:
    batch = collate(rows, pad)
    longest = max(len(row.ids) for row in rows)
    assert batch.input_ids.shape == batch.mask.shape == batch.targets.shape
    for n, row in enumerate(rows):
        rest = longest - len(row.ids)
        assert batch.input_ids[n].tolist() == row.ids + [pad] * rest
        assert batch.mask[n].tolist() == [True] * len(row.ids) + [False] * rest
        learned = [place >= row.start for place in range(len(row.ids))]
        assert batch.targets[n].tolist() == learned + [False] * rest
    assert batch.tokens == sum(len(row.ids) for row in rows)
