"""The seam between the API and whatever answers: the engine here, or a server elsewhere.

A request becomes an `Asked`, a backend makes `Piece`s of its answers, and the API makes replies of
those. Nothing above this line knows tokens, nothing below it knows HTTP replies.
"""

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from star_elastic.serve.schema import (
    ChatRequest,
    ChatTokenLogprob,
    CompletionRequest,
    ThinkingBudget,
)
from star_elastic.serve.schema.replies import FinishReason
from star_elastic.serve.text import Parts


@dataclass(frozen=True)
class Asked:
    """A request that was read, checked and turned into tokens; only its size is open.

    Answer `i` of `request.answers` continues `prompts[i // request.n]`.
    """

    request: ChatRequest | CompletionRequest
    body: Mapping[str, Any]  # as the client sent it
    prompts: tuple[tuple[int, ...], ...]
    max_tokens: int  # of each answer
    thinking: ThinkingBudget | None = None  # None: the model does not think
    inside: bool = False  # the prompt has opened the reasoning already
    salt: str = ""  # prefixes are shared only among requests of one salt

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts together, each counted once."""
        return sum(map(len, self.prompts))


@dataclass(frozen=True, slots=True)
class Piece:
    """What one step adds to one answer.

    `finish` is set on the last one, which may add nothing else. `cached_tokens` (of the prompt, not
    computed again) and `queued_s` (until it had its place) are told once, with the first.
    """

    index: int  # of the answer
    parts: Parts = Parts()
    tokens: int = 0
    reasoning_tokens: int = 0
    logprobs: tuple[ChatTokenLogprob, ...] = ()
    finish: FinishReason | None = None
    cached_tokens: int = 0
    queued_s: float = 0.0


class AnswerFailed(Exception):
    """This request cannot be answered, through no fault of its own.

    `status` is 500 (it failed), 502 or 504 (the server behind did), 503 (nobody can answer now).
    """

    def __init__(self, why: str, status: int = 500, retry_after_s: int | None = None) -> None:
        super().__init__(why)
        self.status, self.retry_after_s = status, retry_after_s


class Backend(Protocol):
    """Answers requests at some sizes."""

    def answers(self, asked: Asked, size: str, confidence: bool) -> AsyncGenerator[Piece, None]:
        """The pieces of all answers, mixed as they come; each answer ends with a `finish`.

        Closing the generator (or cancelling the task that awaits it) frees all that it holds.

        Args:
            confidence: tell the log probability of every token, though the client did not ask.

        Raises:
            AnswerFailed: before the first piece or after it.
        """
        ...

    @property
    def ready(self) -> bool:
        """Whether it can answer now."""
        ...
