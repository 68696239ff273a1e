"""Tokens to text while they come: the stream, joined, is the text of the whole.

A request's text passes three stages, each of which holds back only what the next token may change:
bytes that are part of a character (3 at most), a suffix that may grow into a stop string, and one
that may grow into the mark that ends (or begins) the reasoning.

Text is defined by the bytes of its tokens, decoded as UTF-8; what is no UTF-8 becomes U+FFFD.
"""

import codecs
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tokenizers import Tokenizer

Pieces = Sequence[bytes]  # a token's id -> its bytes


def pieces(tokenizer: Tokenizer, keep: Sequence[str] = ()) -> list[bytes]:
    """The bytes of every token; those of special tokens are empty, but for the ones in `keep`.

    Byte-level BPE, and SentencePiece's way (a mark for the space, `<0x0A>` for a byte).

    Raises:
        ValueError: the tokenizer decodes otherwise, so that a token has no bytes of its own.
    """
    kinds = _decoders(json.loads(tokenizer.to_str())["decoder"])
    if "ByteLevel" in kinds:
        of_bytes = _byte_level_alphabet()
    elif "ByteFallback" in kinds:
        of_bytes = None
    else:
        raise ValueError(f"a tokenizer with decoder {', '.join(kinds) or None} cannot be streamed")
    hidden = {
        token
        for token, added in tokenizer.get_added_tokens_decoder().items()
        if added.special and added.content not in keep
    }
    made = [b""] * tokenizer.get_vocab_size()
    for token, n in tokenizer.get_vocab().items():
        made += [b""] * (n + 1 - len(made))  # ids may have holes
        if n not in hidden:
            made[n] = _fallback(token) if of_bytes is None else _byte_level(token, of_bytes)
    return made


def _decoders(decoder: dict[str, Any] | None) -> list[str]:
    if decoder is None:
        return []
    inner = decoder.get("decoders", [])
    return [decoder["type"], *(kind for each in inner for kind in _decoders(each))]


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's letters for the 256 bytes: itself if printable, else the next unused code point."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + n): byte for n, byte in enumerate(rest)
    }


def _byte_level(token: str, of_bytes: dict[str, int]) -> bytes:
    if all(letter in of_bytes for letter in token):
        return bytes(of_bytes[letter] for letter in token)
    return token.encode()  # an added token stands for itself


def _fallback(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("\u2581", " ").encode()


class StopStrings:
    """Ends a text before the stop string that is complete first; of two at once, the longest.

    Which one is found, and what is released in all, does not depend on how the text is cut.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Raises: ValueError: an empty stop string."""
        if "" in stops:
            raise ValueError("stop: an empty string would stop at once")
        self._stops = list(stops)
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """What may be shown now; nothing more once a stop string was found."""
        if self.found is not None:
            return ""
        self._held += text
        ends = [
            (at + len(stop), -len(stop), stop)
            for stop in self._stops
            if (at := self._held.find(stop)) >= 0
        ]
        if ends:
            end, _, self.found = min(ends)
            shown, self._held = self._held[: end - len(self.found)], ""
            return shown
        shown, self._held = _cut(self._held, self._stops)
        return shown

    def finish(self) -> str:
        """What was held back for a stop string that never came."""
        shown, self._held = self._held, ""
        return shown


def _cut(text: str, marks: Sequence[str]) -> tuple[str, str]:
    """The text, cut before its longest suffix that begins a mark."""
    longest = 0
    for mark in marks:
        for length in range(min(len(mark) - 1, len(text)), longest, -1):
            if text.endswith(mark[:length]):
                longest = length
                break
    return text[: len(text) - longest], text[len(text) - longest :]


@dataclass(frozen=True, slots=True)
class Parts:
    """A piece of output: what the model thinks, and what it answers."""

    reasoning: str = ""
    content: str = ""

    def __add__(self, later: "Parts") -> "Parts":
        return Parts(self.reasoning + later.reasoning, self.content + later.content)


class Reasoning:
    """Splits `<think>...</think>` from the answer.

    Only one block counts, and only at the start: a later mark is part of the answer. Nothing but
    the marks, and blanks before the first, is taken away. `inside` says that the prompt has opened
    the block already; a model that opens it again is forgiven.
    """

    def __init__(self, start: str = "<think>", end: str = "</think>", inside: bool = False) -> None:
        self._start, self._end, self._inside = start, end, inside
        self._held = ""
        self.state: Literal["opening", "thinking", "answering"] = "opening"
        self.thought = inside  # has there been a block?

    @property
    def held(self) -> str:
        """What is not shown yet, as it may grow into the next mark."""
        return self._held

    def push(self, text: str) -> Parts:
        """What may be shown now."""
        self._held += text
        if self.state == "opening":
            self._open()
        if self.state == "opening":
            return Parts()
        if self.state == "answering":
            return Parts(content=self._take(len(self._held)))
        before, mark, after = self._held.partition(self._end)
        if mark:
            self.state, self._held = "answering", ""
            return Parts(before, after)
        return Parts(reasoning=self._take(len(_cut(self._held, [self._end])[0])))

    def finish(self) -> Parts:
        """What was held back for a mark that never came."""
        thinking = self.state == "thinking" or (self.state == "opening" and self._inside)
        rest = self._take(len(self._held))
        return Parts(reasoning=rest) if thinking else Parts(content=rest)

    def _open(self) -> None:
        seen = self._held.lstrip()
        if seen.startswith(self._start):
            self.state, self._held = "thinking", seen[len(self._start) :]
            self.thought = True
        elif not self._start.startswith(seen):
            self.state = "thinking" if self._inside else "answering"

    def _take(self, length: int) -> str:
        taken, self._held = self._held[:length], self._held[length:]
        return taken


class TextStream:
    """The text of one answer, token by token; counts the tokens of the reasoning.

    Stop strings are looked for in the reasoning as well as in the answer (never across the mark
    between them), and end the whole.
    """

    def __init__(
        self, pieces: Pieces, stops: Sequence[str] = (), reasoning: Reasoning | None = None
    ) -> None:
        self._pieces = pieces
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._reasoning = reasoning
        self._in_reasoning, self._in_content = StopStrings(stops), StopStrings(stops)
        self.tokens = 0
        self.reasoning_tokens = 0  # the marks' tokens are among them

    @property
    def stopped(self) -> str | None:
        """The stop string that ended this answer."""
        return self._in_reasoning.found or self._in_content.found

    @property
    def answers(self) -> bool:
        """Whether the reasoning, if there is any, is over."""
        return self._reasoning is None or self._reasoning.state == "answering"

    def push(self, token: int) -> Parts:
        """What may be shown after this token. An id the tokenizer does not know has no text."""
        self.tokens += 1
        piece = self._pieces[token] if token < len(self._pieces) else b""
        answering = self.answers
        parts = self._stop(self._split(self._utf8.decode(piece)))
        if self._reasoning is not None and not answering and self._reasoning.thought:
            self.reasoning_tokens = self.tokens
        return parts

    def finish(self) -> Parts:
        """The rest, when no more tokens come."""
        first = self._split(self._utf8.decode(b"", final=True))
        rest = self._reasoning.finish() if self._reasoning is not None else Parts()
        parts = self._stop(first + rest)
        if self.stopped is not None:
            return parts
        return parts + Parts(self._in_reasoning.finish(), self._in_content.finish())

    def _split(self, text: str) -> Parts:
        return Parts(content=text) if self._reasoning is None else self._reasoning.push(text)

    def _stop(self, parts: Parts) -> Parts:
        reasoning = self._in_reasoning.push(parts.reasoning)
        if parts.content and self._in_reasoning.found is None:
            reasoning += self._in_reasoning.finish()  # no more of it comes
        if self._in_reasoning.found is not None:
            return Parts(reasoning)
        return Parts(reasoning, self._in_content.push(parts.content))
