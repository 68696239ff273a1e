"""Chunks of a streamed answer, of either API, to pieces.

Servers differ; what is missing is done without, what has the wrong type ends the stream. Tokens are
counted from the chunks until the server's own count comes with the last one. So the last piece
carries the difference, which is below zero if a server cut one token into several chunks.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from star_elastic.serve.answers import AnswerFailed, Piece
from star_elastic.serve.schema import ChatTokenLogprob, TokenLogprob
from star_elastic.serve.schema.replies import FinishReason
from star_elastic.serve.text import Parts
from star_elastic.serve.upstream.errors import Garbled

_ENDS: dict[str, FinishReason] = {"stop": "stop", "length": "length"}
_BROKEN = ("abort", "error")  # a server that goes down ends its answers so
_MOST = 2**31  # tokens


def parsed(data: str) -> dict[str, Any]:
    """An event's object.

    Raises:
        Garbled: it is none.
    """
    try:
        chunk = json.loads(data)
    except (ValueError, RecursionError):
        raise Garbled("a chunk that is no JSON") from None
    if not isinstance(chunk, dict):
        raise Garbled("a chunk that is no object")
    if "\\ud" in data.lower():  # half a surrogate pair is no text; some cut them in two
        return json.loads(json.dumps(chunk, ensure_ascii=False).encode("utf-8", "replace"))
    return chunk


class Transcript:
    """Some answers that come in one stream."""

    def __init__(self, answers: int, chat: bool) -> None:
        self._open, self._chat, self._answers = set(range(answers)), chat, answers
        self._tokens = self._reasoning_tokens = 0
        self._usage: Mapping[str, Any] | None = None
        self._held: Piece | None = None  # the last answer's end, until the tokens are known

    @property
    def complete(self) -> bool:
        """Whether every answer has ended."""
        return not self._open

    @property
    def counted(self) -> bool:
        """Whether the server has told how many tokens they have in all."""
        return self._usage is not None

    def read(self, chunk: Mapping[str, Any]) -> list[Piece]:
        """What a chunk adds.

        Raises:
            Garbled: it is not as either API has it.
            AnswerFailed: the server gave up an answer.
        """
        usage = _of(chunk, "usage", dict)
        self._usage = usage or self._usage
        pieces: list[Piece] = []
        for choice in _of(chunk, "choices", list) or []:
            if not isinstance(choice, dict):
                raise Garbled("a choice that is no object")
            pieces += self._pieces(choice)
        return pieces

    def end(self) -> list[Piece]:
        """The last answer's end, with what the server's own count adds."""
        if self._held is None:
            return []
        usage, last, self._held = self._usage or {}, self._held, None
        prompt, completion = (
            _of(usage, f"{name}_tokens_details", dict) or {} for name in ("prompt", "completion")
        )
        told = _count(usage, "completion_tokens"), _count(completion, "reasoning_tokens")
        tokens = self._tokens if told[0] is None else told[0]
        thought = min(tokens, self._reasoning_tokens if told[1] is None else told[1])
        return [
            replace(
                last,
                tokens=tokens - self._tokens,
                reasoning_tokens=thought - self._reasoning_tokens,
                cached_tokens=_count(prompt, "cached_tokens") or 0,
            )
        ]

    def _pieces(self, choice: dict[str, Any]) -> Iterator[Piece]:
        index = choice.get("index", 0)
        if type(index) is not int or not 0 <= index < self._answers:
            raise Garbled("a choice of an answer that nobody asked for")
        if index not in self._open:
            return  # some repeat the end
        parts, logprobs = self._parts(choice), self._logprobs(choice)
        tokens = len(logprobs) or int(bool(parts.reasoning or parts.content))
        if tokens:  # else it tells the role alone
            thought = tokens if parts.reasoning and not parts.content else 0
            self._tokens += tokens
            self._reasoning_tokens += thought
            yield Piece(index, parts, tokens, thought, logprobs)
        finish = _finish(choice)
        if finish is not None:
            self._open.discard(index)
            end = Piece(index, finish=finish)
            if self._open:
                yield end
            else:
                self._held = end

    def _parts(self, choice: dict[str, Any]) -> Parts:
        if not self._chat:
            return Parts(content=_of(choice, "text", str) or "")
        delta = _of(choice, "delta", dict) or {}
        reasoning = _of(delta, "reasoning", str) or _of(delta, "reasoning_content", str)
        return Parts(reasoning or "", _of(delta, "content", str) or "")

    def _logprobs(self, choice: dict[str, Any]) -> tuple[ChatTokenLogprob, ...]:
        found = _of(choice, "logprobs", dict)
        if found is None:
            return ()
        try:
            return _chat_logprobs(found) if self._chat else _logprobs(found)
        except (AttributeError, KeyError, TypeError, ValueError):
            raise Garbled("log probabilities that are not as the API has them") from None


def _finish(choice: dict[str, Any]) -> FinishReason | None:
    said = _of(choice, "finish_reason", str)
    if said in _BROKEN:
        raise AnswerFailed("the server behind gave this answer up", 502)
    return None if said is None else _ENDS.get(said, "stop")


def _chat_logprobs(found: dict[str, Any]) -> tuple[ChatTokenLogprob, ...]:
    return tuple(
        ChatTokenLogprob(
            **_entry(each), top_logprobs=[TokenLogprob(**_entry(top)) for top in _tops(each)]
        )
        for each in found.get("content") or []
    )


def _tops(entry: dict[str, Any]) -> list[dict[str, Any]]:
    return entry.get("top_logprobs") or []


def _entry(entry: dict[str, Any]) -> dict[str, Any]:
    token = entry["token"]
    said = entry.get("bytes")
    if said is not None and not isinstance(said, list):
        raise TypeError("bytes")
    return {
        "token": token,
        "logprob": _finite(entry["logprob"]),
        "bytes": list(token.encode("utf-8", "replace") if said is None else bytes(said)),
    }


def _logprobs(found: dict[str, Any]) -> tuple[ChatTokenLogprob, ...]:
    """Of the older API: parallel lists."""
    tokens, values = found.get("tokens") or [], found.get("token_logprobs") or []
    tops = found.get("top_logprobs") or [None] * len(tokens)
    made = []
    for token, value, top in zip(tokens, values, tops, strict=True):
        likely = [_entry({"token": t, "logprob": v}) for t, v in (top or {}).items()]
        chosen = _entry({"token": token, "logprob": value})
        made.append(ChatTokenLogprob(**chosen, top_logprobs=[TokenLogprob(**t) for t in likely]))
    return tuple(made)


def _finite(value: Any) -> float:
    """JSON knows no infinities; OpenAI's API has -9999 for what cannot be."""
    return max(-9999.0, min(0.0, float(-9999 if value is None else value)))


def _of(holder: Mapping[str, Any], name: str, kind: type) -> Any:
    value = holder.get(name)
    if value is not None and not isinstance(value, kind):
        raise Garbled(f"{name} that is no {kind.__name__}")
    return value


def _count(holder: Mapping[str, Any], name: str) -> int | None:
    value = holder.get(name)
    return value if type(value) is int and 0 <= value <= _MOST else None
