"""JSONL records, their tokens, and padded or packed batches."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import letters_tokenizer

from star_elastic.records import (
    Example,
    Record,
    collate,
    encode,
    final_answer,
    pack,
    prompt_text,
    read_records,
    to_record,
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
        ({"prompt": None, "text": "abc", "task": None}, Record("", "abc", "text", "abc")),
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
    + ['{"question": "q"}', '{"question": "q", "answer": 1}', "null", '{"text": null}']
    + ['{"messages": []}', '{"messages": "hi"}', '{"messages": [1]}', '{"messages": 1}']
    + ['{"messages": [{"role": "user"}]}', '{"messages": [{"role": "user", "content": 1}]}'],
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
    assert example == Example([*ids("ab=cd"), tokenizer.eos_token_id], [(3, 6)])
    (example,) = encode(tokenizer, records, 100, "all")
    assert example == Example([*ids("ab=cd"), tokenizer.eos_token_id], [(1, 6)])


def test_plain_text_learns_from_its_second_token() -> None:
    (example,) = encode(letters_tokenizer(), [Record("", "abc", "t", "")], 100, "completion")
    assert example.spans == [(1, 4)]


@pytest.mark.parametrize("max_length", [1, 2, 3, 4, 5, 6, 7])
def test_examples_are_cut_to_the_longest_allowed(max_length: int) -> None:
    tokenizer = letters_tokenizer()
    (example,) = encode(tokenizer, [Record("ab=", "cd", "t", "")], max_length, "completion")
    assert example.ids == [*ids("ab=cd"), tokenizer.eos_token_id][:max_length]
    assert example.spans == ([(3, min(6, max_length))] if max_length > 3 else [])


def test_the_chat_template_renders_prompts() -> None:
    tokenizer = letters_tokenizer(chat=True)
    assert prompt_text(tokenizer, "ab") == ":ab="
    assert prompt_text(tokenizer, "") == ""
    assert prompt_text(letters_tokenizer(), "ab") == "ab"
    (example,) = encode(tokenizer, [Record("ab", "cd", "t", "")], 100, "completion")
    assert example == Example([*ids(":ab=cd"), tokenizer.eos_token_id], [(4, 7)])


@st.composite
def examples(draw: st.DrawFn) -> list[Example]:
    token_lists = draw(
        st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=9), min_size=1, max_size=5)
    )
    return [Example(tokens, draw(spans(len(tokens)))) for tokens in token_lists]


@st.composite
def spans(draw: st.DrawFn, length: int) -> list[tuple[int, int]]:
    edges = sorted(draw(st.sets(st.integers(1, length), max_size=4)))
    return list(zip(edges[::2], edges[1::2], strict=False))


def learned(row: Example) -> list[bool]:
    return [any(a <= place < b for a, b in row.spans) for place in range(len(row.ids))]


@given(rows=examples(), pad=st.integers(0, 3))
def test_a_batch_holds_its_rows(rows: list[Example], pad: int) -> None:
    batch = collate(rows, pad)
    longest = max(len(row.ids) for row in rows)
    assert batch.input_ids.shape == batch.mask.shape == batch.targets.shape
    for n, row in enumerate(rows):
        rest = longest - len(row.ids)
        assert batch.input_ids[n].tolist() == row.ids + [pad] * rest
        assert batch.mask[n].tolist() == [True] * len(row.ids) + [False] * rest
        assert batch.targets[n].tolist() == learned(row) + [False] * rest
    assert batch.tokens == sum(len(row.ids) for row in rows)
    assert batch.documents is None and list(batch.inputs) == ["input_ids"]


@given(rows=st.lists(examples(), min_size=1, max_size=3), room=st.integers(0, 3))
def test_packed_rows_hold_their_documents(rows: list[list[Example]], room: int) -> None:
    length = room + max(sum(len(e.ids) for e in row) for row in rows)
    batch = pack(rows, length, pad=9).to(torch.device("cpu"))
    inputs = batch.inputs
    assert list(inputs) == ["input_ids", "position_ids", "seq_idx"]
    assert all(tensor.shape == (len(rows), length) for tensor in inputs.values())
    assert inputs["seq_idx"].dtype == torch.int32
    for n, row in enumerate(rows):
        sizes = [len(example.ids) for example in row]
        rest = length - sum(sizes)
        each = [number for number, size in enumerate([*sizes, rest]) for _ in range(size)]
        assert inputs["seq_idx"][n].tolist() == each
        places = [place for size in [*sizes, rest] for place in range(size)]
        assert inputs["position_ids"][n].tolist() == places
        ids_, targets = ([x for e in row for x in f(e)] for f in (lambda e: e.ids, learned))
        assert inputs["input_ids"][n].tolist() == ids_ + [9] * rest
        assert batch.targets[n].tolist() == targets + [False] * rest
        assert batch.mask[n].tolist() == [True] * (length - rest) + [False] * rest


SAYS = "{% if m.role == 'assistant' %}<{{ m.content }}>{% else %}({{ m.content }}){% endif %}"
PLAIN = "{% for m in messages %}" + SAYS + "{% endfor %}{% if add_generation_prompt %}<{% endif %}"
THOUGHTLESS = PLAIN.replace(  # past turns lose their thinking, as in many templates
    "<{{ m.content }}>",
    "<{{ m.content if loop.last else m.content.split('</think>')[-1] }}>",
)
OPENED = PLAIN.replace("%}<{% endif %}", "%}<<think>{% endif %}")  # asks for thinking
REWRITES = PLAIN.replace("<{{ m.content }}>", "{{ '<' ~ m.content if loop.last else '' }}>")
SHUFFLES = PLAIN.replace(  # the first answer is moved behind the last
    "<{{ m.content }}>", "{% if loop.last or not loop.index == 3 %}<{{ m.content }}>{% endif %}"
).replace(
    "{% endfor %}", "{% endfor %}{% if messages|length > 3 %}<{{ messages[2].content }}>{% endif %}"
)
PICKY = "{{ raise_exception('roles must alternate') }}"
TURNS = ["s", "q1", "<think>t1</think>a1", "q2", "<think>t2</think>a2"]
ROLES = ["system", "user", "assistant", "user", "assistant"]


def conversation(*contents: str) -> dict[str, Any]:
    pairs = zip(ROLES, contents, strict=False)
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


def parts(template: str | None, *contents: str, cut: int | None = None) -> tuple[str, list[str]]:
    """A conversation as the model sees it, and what it learns to say."""
    tokenizer = letters_tokenizer()
    tokenizer.chat_template = template
    record = to_record(conversation(*contents))
    (example,) = encode(tokenizer, [record], cut, "completion")
    text = tokenizer.convert_ids_to_tokens(example.ids)
    return "".join(text), ["".join(text[a:b]) for a, b in example.spans]


def test_a_conversation_is_a_record(tmp_path: Path) -> None:
    value = conversation("s", "q", "so #### 7")
    (record,) = read_records(lines(tmp_path / "a.jsonl", value))
    assert record == Record("", "so #### 7", "text", "7", tuple(value["messages"]))
    value["messages"][0]["name"] = None  # columns of a table that only others fill
    assert to_record(value) == record
    (record,) = read_records(lines(tmp_path / "a.jsonl", conversation("s", "q")))
    assert record.completion == ""


def test_every_turn_of_the_assistant_is_learned() -> None:
    text, said = parts(PLAIN, *TURNS)
    assert text == "(s)(q1)<<think>t1</think>a1>(q2)<<think>t2</think>a2>"
    assert said == ["<think>t1</think>a1>", "<think>t2</think>a2>"]
    assert parts(PLAIN, *TURNS, cut=24)[1] == ["<think>t1</think"]
    assert parts(PLAIN, "s", "q1")[1] == []


def test_past_turns_are_learned_as_they_are_shown() -> None:
    text, said = parts(THOUGHTLESS, *TURNS)
    assert text == "(s)(q1)<a1>(q2)<<think>t2</think>a2>"
    assert said == ["a1>", "<think>t2</think>a2>"]


def test_past_turns_may_be_shown_with_empty_thinking() -> None:
    template = PLAIN.replace("%}<{% endif %}", "%}<<think> {% endif %}").replace(
        "<{{ m.content }}>",
        "<{{ m.content if loop.last else '<think></think>' ~ m.content.split('</think>')[-1] }}>",
    )
    text, said = parts(template, "s", "q1", "<think> t1</think>a1", "q2", "<think> t2</think>a2")
    assert text == "(s)(q1)<<think></think>a1>(q2)<<think> t2</think>a2>"
    assert said == ["</think>a1>", "t2</think>a2>"]
    _, said = parts(template, "s", "q1", "<think> t1</think>", "q2", "<think> t2</think>a2")
    assert said == ["t2</think>a2>"]  # of the first turn nothing is left to see


def test_what_the_template_says_for_the_assistant_is_not_learned() -> None:
    assert parts(OPENED, *TURNS)[1] == ["t1</think>a1>", "t2</think>a2>"]


def test_all_of_a_conversation_may_be_learned() -> None:
    tokenizer = letters_tokenizer()
    tokenizer.chat_template = PLAIN
    (example,) = encode(tokenizer, [to_record(conversation(*TURNS))], None, "all")
    assert example.spans == [(1, len(example.ids))]


def test_a_conversation_that_begins_with_the_assistant() -> None:
    tokenizer = letters_tokenizer()
    tokenizer.chat_template = PLAIN
    turns = [{"role": "assistant", "content": "hi"}, {"role": "user", "content": "q"}]
    (example,) = encode(tokenizer, [to_record({"messages": turns})], None, "completion")
    assert example == Example(ids("<hi>(q)"), [(1, 4)])


@pytest.mark.parametrize(
    ("template", "match"),
    [
        (None, "messages need a chat template, and the tokenizer has none"),
        (PICKY, "messages: the chat template cannot render them: roles must alternate"),
        (REWRITES, "messages: the chat template rewrites turn 3 beyond recognition"),
        (SHUFFLES, "messages: the chat template shows turns that cannot be told apart"),
    ],
)
def test_conversations_that_cannot_be_rendered(template: str | None, match: str) -> None:
    with pytest.raises(ValueError, match=f"^{match}$"):
        parts(template, *TURNS)


def test_records_of_all_kinds_are_encoded_together() -> None:
    tokenizer = letters_tokenizer()
    tokenizer.chat_template = PLAIN
    rows = [Record("", "ab", "t", ""), to_record(conversation(*TURNS)), Record("q", "a", "t", "")]
    together = encode(tokenizer, rows, 20, "completion")
    assert together == [encode(tokenizer, [row], 20, "completion")[0] for row in rows]
    assert encode(tokenizer, [], 20) == []
