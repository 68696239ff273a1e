"""Records to fit a router on: JSONL, an object a line, graded already or to be graded here.

To be graded: {"prompt" or "messages" or "question", "answer"}; every size answers, and an answer is
good if it is exactly the one given, what was thought before it left away. Graded:
{"prompt" or "messages", "outcomes": {size: 0 to 1}}, and "tokens": {size: number} of the answers if
known.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from star_elastic.folder import one_line
from star_elastic.records import final_answer, prompt_text
from star_elastic.serve.difficulty.features import conversation

Grade = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]


class Turn(BaseModel):
    """One message of a conversation; what else its template reads is kept."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: str
    content: str


class Graded(BaseModel):
    """One line. Other keys of a record (task, completion) are no matter here."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)

    prompt: str | None = Field(default=None, min_length=1)
    messages: list[Turn] | None = Field(default=None, min_length=1)
    answer: str | None = None
    outcomes: dict[str, Grade] | None = Field(default=None, min_length=1)
    tokens: dict[str, Count] | None = None

    @model_validator(mode="before")
    @classmethod
    def _question(cls, value: Any) -> Any:
        """{question, answer} is how some data sets spell it, the thinking being in the answer."""
        if isinstance(value, dict) and "question" in value and "prompt" not in value:
            answer = value.get("answer")
            told = final_answer(answer) if isinstance(answer, str) else answer
            return {**value, "prompt": value["question"], "answer": told}
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("a record has either a prompt or messages")
        if self.answer is None and self.outcomes is None:
            raise ValueError("neither an answer nor outcomes")
        if self.messages is not None and self.messages[-1].role == "assistant":
            raise ValueError("messages: the last is the assistant's; it is what is to be graded")
        return self

    @property
    def text(self) -> str:
        """What features read."""
        if self.messages is None:
            return self.prompt or ""
        return conversation([turn.content for turn in self.messages])

    def ids(self, tokenizer: Any) -> list[int]:
        """The prompt as the model reads it, in tokens.

        Raises:
            ValueError: messages that the chat template cannot render, or no token.
        """
        if self.messages is None:
            rendered = prompt_text(tokenizer, self.prompt or "")
        elif tokenizer.chat_template is None:
            raise ValueError("messages need a chat template, and the tokenizer has none")
        else:
            turns = [turn.model_dump() for turn in self.messages]
            try:
                rendered = tokenizer.apply_chat_template(
                    turns, tokenize=False, add_generation_prompt=True
                )
            except Exception as error:  # templates raise what they like
                reason = f"the chat template cannot render them: {one_line(error)}"
                raise ValueError(f"messages: {reason}") from None
        found = tokenizer(rendered, add_special_tokens=False)["input_ids"]
        if not found:
            raise ValueError("prompt: no token")
        return found


def read_graded(path: str | Path, sizes: Sequence[str]) -> list[Graded]:
    """The records of a file, all of one kind.

    Args:
        sizes: those whose outcomes are needed where records are graded.

    Raises:
        ValueError: file, line and field of the first that is none, or of the other kind.
    """
    records: list[Graded] = []
    try:
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    where = f"{path}: line {number}"
                    records.append(_record(line, where))
                    _check(records[-1], records[0], sizes, where)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable: {one_line(error)}") from None
    if not records:
        raise ValueError(f"{path}: no records")
    return records


def _record(line: str, where: str) -> Graded:
    try:
        return Graded.model_validate(json.loads(line))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        reason = first["msg"].removeprefix("Value error, ")
        value = "" if first["type"] == "value_error" else f", not {first['input']!r:.80}"
        raise ValueError(f"{where}: {field + ': ' if field else ''}{reason}{value}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON: {one_line(error)}") from None


def _check(record: Graded, first: Graded, sizes: Sequence[str], where: str) -> None:
    if (record.outcomes is None) != (first.outcomes is None):
        raise ValueError(f"{where}: outcomes: some records have them, some do not")
    lacking = [size for size in sizes if size not in (record.outcomes or sizes)]
    if lacking:
        raise ValueError(f"{where}: outcomes: none of size {lacking[0]!r}")
