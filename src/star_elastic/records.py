"""Text examples: JSONL records, their rendering as tokens, and batches of them.

A record is {prompt, completion}, {question, answer}, {messages} or {text}; `task` and `answer` are
kept for evaluation. Where the tokenizer has a chat template, prompts and conversations are rendered
with it. A batch holds one example a row, padded on the right (nothing later attends to padding), or
rows packed with documents that do not see one another.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from os.path import commonprefix
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Span = tuple[int, int]
LossOn = Literal["all", "completion"]
_Piece = tuple[str, bool]  # text, and whether it is what the model is to say


@dataclass(frozen=True)
class Record:
    """One example as text. `prompt` is empty for plain text and for conversations.

    Of a conversation (`messages`: role, content and what else its template reads) `completion` is
    the last thing the assistant says.
    """

    prompt: str
    completion: str
    task: str
    answer: str
    messages: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Example:
    """One example as tokens; the loss falls on those in `spans`, half-open and never from 0."""

    ids: list[int]
    spans: list[Span]


@dataclass(frozen=True)
class Batch:
    """Rows (batch, length). `mask` marks real tokens, `targets` those the loss is on.

    In packed rows `documents` numbers the document of every token, int32, in order; padding counts
    as one.
    """

    input_ids: Tensor
    mask: Tensor
    targets: Tensor
    documents: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        documents = None if self.documents is None else self.documents.to(device)
        input_ids, mask = self.input_ids.to(device), self.mask.to(device)
        return Batch(input_ids, mask, self.targets.to(device), documents)

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What a stock model is called with, `use_cache=False` beside it.

        Positions that start anew keep the documents of packed rows apart in attention, `seq_idx`
        in Mamba mixers (see `stock.use_chunk_scan`).
        """
        if self.documents is None:
            return {"input_ids": self.input_ids}
        place = torch.arange(self.documents.shape[1], device=self.documents.device)
        changes = F.pad(self.documents[:, 1:] != self.documents[:, :-1], (1, 0))
        positions = place - (place * changes).cummax(1).values
        return {
            "input_ids": self.input_ids,
            "position_ids": positions,
            "seq_idx": self.documents,
        }

    def split(self, count: int) -> "list[Batch]":
        """Some rows each, as even as can be; at most one row a piece."""
        fields = (self.input_ids, self.mask, self.targets)
        parts = [tensor.tensor_split(count) for tensor in fields]
        rest = (None,) * count if self.documents is None else self.documents.tensor_split(count)
        return [Batch(*each) for each in zip(*parts, rest, strict=True) if len(each[0])]

    @property
    def tokens(self) -> int:
        """Real tokens, padding not counted."""
        return int(self.mask.sum())


def read_records(path: str | Path) -> list[Record]:
    """The records of a JSONL file.

    Raises:
        ValueError: file and line of the first record that is not one.
    """
    records = []
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    records.append(to_record(json.loads(line)))
                except ValueError as error:
                    raise ValueError(f"{path}: line {number}: not a record: {error}") from None
    if not records:
        raise ValueError(f"{path}: no records")
    return records


def final_answer(text: str) -> str:
    """What comes after the thinking: behind the last `</think>`, else behind the last `####`."""
    for mark in ("</think>", "####"):
        if mark in text:
            return text.rpartition(mark)[2].strip()
    return text.strip()


def prompt_text(tokenizer: Any, prompt: str) -> str:
    """A prompt as the model expects to see it before it answers."""
    if tokenizer.chat_template is None or not prompt:
        return prompt
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def encode(
    tokenizer: Any,
    records: Sequence[Record],
    max_length: int | None = None,
    loss_on: LossOn = "all",
) -> list[Example]:
    """Records as tokens, cut to `max_length`; the loss falls on all of them or on completions.

    Of a conversation every turn of the assistant is a completion.

    Raises:
        ValueError: a conversation that the tokenizer's chat template cannot render.
    """
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    pieces = [_pieces(tokenizer, record) for record in records]
    texts = [text for row in pieces for text, _ in row]
    tokenized = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    tokens: Iterator[list[int]] = iter(tokenized)
    examples = []
    for record, row in zip(records, pieces, strict=True):
        parts = [(next(tokens), said or loss_on == "all") for _, said in row]
        if not record.messages:  # a template closes the turns of a conversation itself
            parts.append((eos, True))
        examples.append(_example(parts, max_length))
    return examples


def collate(examples: Sequence[Example], pad: int) -> Batch:
    """Right-padded tensors of some examples."""
    length = max(len(example.ids) for example in examples)
    input_ids = torch.full((len(examples), length), pad)
    mask = torch.zeros(len(examples), length, dtype=torch.bool)
    targets = torch.zeros(len(examples), length, dtype=torch.bool)
    for row, example in enumerate(examples):
        input_ids[row, : len(example.ids)] = torch.tensor(example.ids)
        mask[row, : len(example.ids)] = True
        for start, end in example.spans:
            targets[row, start:end] = True
    return Batch(input_ids, mask, targets)


def pack(rows: Sequence[Sequence[Example]], length: int, pad: int) -> Batch:
    """Rows of exactly `length` tokens, each of several examples one after the other."""
    joined = collate([_joined(row) for row in rows], pad)
    missing = length - joined.input_ids.shape[1]
    assert missing >= 0, "a row is too long"
    documents = torch.empty(len(rows), length, dtype=torch.int32)
    for number, row in enumerate(rows):
        lengths = [len(example.ids) for example in row]
        lengths.append(length - sum(lengths))
        counts = torch.arange(len(lengths), dtype=torch.int32)
        documents[number] = counts.repeat_interleave(torch.tensor(lengths))
    return Batch(
        F.pad(joined.input_ids, (0, missing), value=pad),
        F.pad(joined.mask, (0, missing)),
        F.pad(joined.targets, (0, missing)),
        documents,
    )


def to_record(value: Any) -> Record:
    """One record from its fields; those that are None count as absent.

    Raises:
        ValueError: what keeps it from being one, in one line.
    """
    try:
        return _record({key: item for key, item in value.items() if item is not None})
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(repr(error)) from None


def _record(value: dict[str, Any]) -> Record:
    messages: tuple[dict[str, Any], ...] = ()
    if "messages" in value:
        messages = _messages(value["messages"])
        turns = [turn["content"] for turn in messages if turn["role"] == "assistant"]
        prompt, completion = "", turns[-1] if turns else ""
    elif "prompt" in value:
        prompt, completion = value["prompt"], value["completion"]
    elif "question" in value:
        prompt, completion = value["question"], value["answer"]
        value = {**value, "answer": final_answer(completion)}
    else:
        prompt, completion = "", value["text"]
    answer = value.get("answer", final_answer(completion))
    texts = (prompt, completion, value.get("task", "text"), answer)
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a field is not text")
    return Record(*texts, messages)


def _messages(values: Any) -> tuple[dict[str, Any], ...]:
    turns = tuple({key: item for key, item in turn.items() if item is not None} for turn in values)
    for turn in turns:
        if not (isinstance(turn["role"], str) and isinstance(turn["content"], str)):
            raise ValueError("role or content of a message is not text")
    if not turns:
        raise ValueError("no messages")
    return turns


def _pieces(tokenizer: Any, record: Record) -> list[_Piece]:
    if not record.messages:
        return [(prompt_text(tokenizer, record.prompt), False), (record.completion, True)]
    if tokenizer.chat_template is None:
        raise ValueError("messages need a chat template, and the tokenizer has none")
    text = _render(tokenizer, record.messages)
    turns = [n for n, turn in enumerate(record.messages) if turn["role"] == "assistant"]
    cuts = [cut for n in turns for cut in _turn(tokenizer, record.messages, n, text)]
    if cuts != sorted(cuts):
        raise ValueError("messages: the chat template shows turns that cannot be told apart")
    edges = pairwise([0, *cuts, len(text)])
    return [(text[start:end], n % 2 == 1) for n, (start, end) in enumerate(edges)]


def _turn(tokenizer: Any, messages: Sequence[Mapping[str, Any]], n: int, text: str) -> Span:
    """Where in the rendered conversation the n-th message is said, its closing mark included.

    Templates may show a turn otherwise once it is past, mostly without its thinking.
    """
    context = _render(tokenizer, messages[:n], add_generation_prompt=True) if n else ""
    through = _render(tokenizer, messages[: n + 1])
    start = len(commonprefix([context, text]))
    if text.startswith(through):
        return start, len(through)
    visible = messages[n]["content"].rpartition("</think>")[2].strip()
    closed = through[through.rfind(visible) :] if visible in through else text
    found = text.find(closed, start)
    if found < 0 or (n and not text.startswith(_render(tokenizer, messages[:n]))):
        raise ValueError(f"messages: the chat template rewrites turn {n + 1} beyond recognition")
    return start, found + len(closed)


def _render(tokenizer: Any, messages: Iterable[Mapping[str, Any]], **options: bool) -> str:
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
    except Exception as error:  # templates raise what they like
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"messages: the chat template cannot render them: {reason}") from None


def _example(parts: Sequence[tuple[list[int], bool]], max_length: int | None) -> Example:
    ids = [token for tokens, _ in parts for token in tokens][:max_length]
    edges = pairwise(accumulate((len(tokens) for tokens, _ in parts), initial=0))
    spans: list[Span] = []
    for (start, end), (_, learned) in zip(edges, parts, strict=True):
        start, end = max(1, start), min(end, len(ids))
        if not learned or start >= end:
            continue
        if spans and spans[-1][1] == start:
            start = spans.pop()[0]
        spans.append((start, end))
    return Example(ids, spans)


def _joined(row: Sequence[Example]) -> Example:
    ids: list[int] = []
    spans: list[Span] = []
    for example in row:
        spans += [(len(ids) + start, len(ids) + end) for start, end in example.spans]
        ids += example.ids
    return Example(ids, spans)
