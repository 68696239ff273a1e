"""Text examples: JSONL records, their rendering as tokens, and padded batches of them.

A record is {prompt, completion}, {question, answer} or {text}; `task` and `answer` are kept for
evaluation. Where the tokenizer has a chat template, prompts and completions are rendered with it.
Rows are padded on the right: nothing later attends to padding, nothing is lost to packing.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Record:
    """One example as text. `prompt` is empty for plain text."""

    prompt: str
    completion: str
    task: str
    answer: str


@dataclass(frozen=True)
class Example:
    """One example as tokens; the loss falls on `ids[start:]`."""

    ids: list[int]
    start: int


@dataclass(frozen=True)
class Batch:
    """Padded rows (batch, length). `mask` marks real tokens, `targets` those the loss is on."""

    input_ids: Tensor
    mask: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        return Batch(*(tensor.to(device) for tensor in (self.input_ids, self.mask, self.targets)))

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
                    records.append(_record(json.loads(line)))
                except (ValueError, KeyError, AttributeError, TypeError) as error:
                    raise ValueError(f"{path}: line {number}: not a record: {error!r}") from None
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
    max_length: int,
    loss_on: Literal["all", "completion"] = "all",
) -> list[Example]:
    """Records as tokens, cut to `max_length`; the loss falls on all of them or the completion."""
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    prompts = [prompt_text(tokenizer, record.prompt) for record in records]
    before = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    after = tokenizer([r.completion for r in records], add_special_tokens=False)["input_ids"]
    return [
        Example((prompt + completion + eos)[:max_length], max(1, len(prompt) * (loss_on != "all")))
        for prompt, completion in zip(before, after, strict=True)
    ]


def collate(examples: Sequence[Example], pad: int) -> Batch:
    """Right-padded tensors of some examples."""
    length = max(len(example.ids) for example in examples)
    input_ids = torch.full((len(examples), length), pad)
    mask = torch.zeros(len(examples), length, dtype=torch.bool)
    targets = torch.zeros(len(examples), length, dtype=torch.bool)
    for row, example in enumerate(examples):
        input_ids[row, : len(example.ids)] = torch.tensor(example.ids)
        mask[row, : len(example.ids)] = True
        targets[row, example.start : len(example.ids)] = True
    return Batch(input_ids, mask, targets)


def _record(value: dict[str, Any]) -> Record:
    if "prompt" in value:
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
    return Record(*texts)
