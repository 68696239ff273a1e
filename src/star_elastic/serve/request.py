"""A request, what is told of it, and its answer under way."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from star_elastic.serve.sampling import Choice, Sampling, choose
from star_elastic.serve.space import Job


@dataclass(frozen=True)
class Request:
    """A prompt of token ids for one size, pinned.

    The answer begins with `forced`. `watch` hears of each token of the answer in order, on the
    engine's thread; the tokens that it returns are forced next. One that raises fails its request.
    Forced tokens are told, and count, like any other.
    """

    prompt: Sequence[int]
    size: str
    max_tokens: int = 16
    sampling: Sampling = field(default_factory=Sampling)
    priority: int = 0  # lower goes first
    forced: Sequence[int] = ()
    watch: Callable[[int], Sequence[int]] | None = None
    salt: str = ""  # what is computed under one salt is not reused under another

    def check(self, max_length: int, vocabulary: int) -> None:
        """Hold that an engine can answer.

        Raises:
            ValueError: a prompt that is empty, too long or of unknown tokens, or an answer of none.
        """
        if not self.prompt:
            raise ValueError("prompt: no token")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens {self.max_tokens}: must be at least 1")
        length = len(self.prompt) + self.max_tokens
        if length > max_length:
            raise ValueError(f"{length} tokens of prompt and answer: at most {max_length}")
        check_tokens((*self.prompt, *self.forced, *self.sampling.logit_bias), vocabulary)


@dataclass(frozen=True)
class Event:
    """A token of a request, or its end, or both at once.

    `finish` is None while it goes on, then "stop" (the token is a stop id), "length", "cancelled"
    or "error" (and `error` says which).
    """

    id: int
    token: int | None = None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    finish: str | None = None
    error: str | None = None
    cached_tokens: int = 0  # of the prompt, not computed again; told with the first token


class Answer:
    """A request that is not finished yet, and its sequence."""

    def __init__(self, request: Request, job: Job, end_ids: frozenset[int], vocabulary: int):
        stop_ids = request.sampling.stop_ids
        self.request = request
        self.job = job
        self._stop_ids = end_ids if stop_ids is None else stop_ids
        self._vocabulary = vocabulary
        self._generator: torch.Generator | None = request.sampling.generator()
        self._forced = deque(request.forced)
        self._plain = request.sampling.is_plain

    def take(self, likeliest: int | None, logits_V: Tensor) -> Event:
        """Append the next token; `likeliest` is that of the logits, None if they are not finite.

        Raises:
            Exception: logits that are no numbers, or whatever `watch` raises.
        """
        choice = self._choose(likeliest, logits_V)
        job, request = self.job, self.request
        is_first = len(job.tokens) == job.prompt_length
        job.tokens.append(choice.token)
        if request.watch is not None:
            follows = request.watch(choice.token)
            check_tokens(follows, self._vocabulary)
            self._forced += follows
        finish = None
        if choice.token in self._stop_ids:
            finish = "stop"
        elif len(job.tokens) == job.prompt_length + request.max_tokens:
            finish = "length"
        cached = (job.num_reused or 0) if is_first else 0
        event = (job.id, choice.token, choice.logprob, choice.top, finish, None, cached)
        return Event(*event)

    def _choose(self, likeliest: int | None, logits_V: Tensor) -> Choice:
        forced = self._forced.popleft() if self._forced else None
        if likeliest is not None and self._plain:
            return Choice(likeliest if forced is None else forced)
        request, job = self.request, self.job
        said = job.tokens[job.prompt_length :]
        logits_V = logits_V.float().cpu()
        return choose(logits_V, request.sampling, request.prompt, said, self._generator, forced)


def check_tokens(tokens: Sequence[int], vocabulary: int) -> None:
    """Hold that tokens are of a vocabulary.

    Raises:
        ValueError: naming one that is not.
    """
    for token in tokens:
        if not 0 <= token < vocabulary:
            raise ValueError(f"token {token}: the vocabulary has {vocabulary}")
