"""The end of a model's reasoning, forced when its budget is spent.

States, as in llama.cpp's sampler: waiting for the reasoning to begin, counting, waiting for a
character to be whole, done.
"""

import codecs
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from star_elastic.serve.text import Pieces, Reasoning


@dataclass(frozen=True)
class Marks:
    """What a model writes around its reasoning; `encode` turns text into its tokens."""

    start: str
    end: str
    encode: Callable[[str], Sequence[int]]

    def reasoning(self, inside: bool) -> Reasoning:
        """A splitter of one answer; `inside`: the prompt has opened the reasoning."""
        return Reasoning(self.start, self.end, inside)


class Forcing:
    """Watches one answer's tokens, and says what must follow."""

    def __init__(self, pieces: Pieces, marks: Marks, budget: int, inside: bool) -> None:
        """
        Args:
            budget: tokens that the reasoning may have, the marks not counted.
        """
        self._pieces, self._marks, self._budget = pieces, marks, budget
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._reasoning = marks.reasoning(inside)
        self._inside = inside
        self._thought = 0  # tokens
        self._done = False

    @property
    def first(self) -> Sequence[int]:
        """What the answer must begin with: the end, where no token may be thought at all."""
        if self._inside and self._budget == 0:
            self._done = True
            return self._marks.encode(self._marks.end)
        return ()

    def __call__(self, token: int) -> Sequence[int]:
        """What must follow this token of the answer."""
        if self._done:
            return ()
        was_thinking = self._thinks
        piece = self._pieces[token] if token < len(self._pieces) else b""
        self._reasoning.push(self._utf8.decode(piece))
        if self._reasoning.state == "answering":
            self._done = True
            return ()
        self._thought += was_thinking
        whole = not self._utf8.getstate()[0]
        if self._thinks and self._thought >= self._budget and whole:
            self._done = True
            end, begun = self._marks.end, self._reasoning.held
            return self._marks.encode(end.removeprefix(begun))
        return ()

    @property
    def _thinks(self) -> bool:
        state = self._reasoning.state
        return state == "thinking" or (state == "opening" and self._inside)
