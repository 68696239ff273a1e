"""One request being answered: pieces as they come, and the account of them."""

import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from star_elastic.serve.answers import Asked, Backend, Piece
from star_elastic.serve.policy import Choice, Refused, Size, confidence
from star_elastic.serve.schema import ElasticReport, Usage

Escalate = Callable[[str], Choice]  # the size that was not sure -> who answers instead


@dataclass
class Counts:
    """What one size did for a request. Times are of `time.monotonic`."""

    began: float
    queued_s: float = 0.0
    first: float | None = None
    last: float | None = None
    tokens: int = 0
    reasoning_tokens: int = 0
    cached_tokens: int = 0


@dataclass(eq=False)
class Answering:
    """A request and the size that answers; several, one after the other, where one is not sure."""

    id: str
    asked: Asked
    choice: Choice
    backends: Mapping[str, Backend]
    escalate: Escalate
    ignored: Sequence[str] = ()
    key: str | None = None  # the name of who asked
    charged: float = 0.0  # in advance
    counts: dict[str, Counts] = field(default_factory=dict)  # by size, in order of use
    why: list[str] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.why += self.choice.why

    @property
    def size(self) -> str:
        """Who answers now, or answered last."""
        return self.choice.size

    @property
    def most_tokens(self) -> int:
        """That all answers together may have."""
        return self.asked.max_tokens * self.asked.request.answers

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """The pieces of the answers. Those that may yet be thrown away are held until it is sure.

        Raises:
            AnswerFailed: from a backend.
        """
        while True:
            held: list[Piece] = []
            unsure = self.choice.escalate_below is not None
            async with aclosing(self._of_size()) as pieces:
                async for piece in pieces:
                    if unsure:
                        held.append(piece)
                    else:
                        yield self._shown(piece)
            if self._is_sure(held):
                for piece in held:
                    yield self._shown(piece)
                return

    def usage(self) -> Usage:
        """Tokens of the prompt and of the answers that were shown."""
        shown = self.counts.get(self.size)
        return Usage.of(
            self.asked.prompt_tokens,
            shown.tokens if shown else 0,
            shown.reasoning_tokens if shown else 0,
            shown.cached_tokens if shown else 0,
        )

    def report(self) -> ElasticReport:
        """Which sizes answered, how much each, and why."""
        thinking = self.asked.thinking
        return ElasticReport(
            sizes=list(self.counts),
            tokens={size: counts.tokens for size, counts in self.counts.items()},
            switches=max(0, len(self.counts) - 1),
            routed_because=self.why,
            ignored=list(self.ignored),
            thinking_budget=None if thinking is None else thinking.tokens,
        )

    def cost(self, sizes: Mapping[str, Size]) -> float:
        """What it cost, in the unit of `Size.price`; a size that is gone costs nothing."""
        return sum(
            sizes[size].price * (self.asked.prompt_tokens + counts.tokens)
            for size, counts in self.counts.items()
            if size in sizes
        )

    async def _of_size(self) -> AsyncGenerator[Piece, None]:
        counts = self.counts[self.size] = Counts(time.monotonic())
        sure = self.choice.escalate_below is None
        answers = self.backends[self.size].answers(self.asked, self.size, not sure)
        async with aclosing(answers) as pieces:
            async for piece in pieces:
                counts.last = time.monotonic()
                if counts.first is None:
                    counts.first, counts.queued_s = counts.last, piece.queued_s
                counts.tokens += piece.tokens
                counts.reasoning_tokens += piece.reasoning_tokens
                if piece.index % self.asked.request.n == 0:  # a prompt counts once
                    counts.cached_tokens += piece.cached_tokens
                yield piece

    def _is_sure(self, held: Sequence[Piece]) -> bool:
        """Whether the answer stands; if not, who answers next is chosen."""
        below = self.choice.escalate_below
        if below is None:
            return True
        found = confidence([each.logprob for piece in held for each in piece.logprobs])
        if found >= below:
            return True
        try:
            self.choice = self.escalate(self.size)
        except Refused as error:
            self.why.append(f"{error}; confidence {found:.2f}")
            return True
        self.why += self.choice.why
        return False

    def _shown(self, piece: Piece) -> Piece:
        """Without what only the confidence was measured by."""
        return piece if self.asked.request.top is not None else replace(piece, logprobs=())
