"""The next token from logits, as one request wants it, whatever else is in the batch.

The order is that of transformers: bias, penalties, temperature, top-k, top-p, min-p. Log
probabilities are the model's own, before any of it.

V: the vocabulary.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How a request chooses its tokens; greedy unless told otherwise.

    Raises:
        ValueError: a value out of its range, or not finite.
    """

    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0  # of the likeliest token's probability
    repetition_penalty: float = 1.0  # over prompt and answer, on the logit's size
    presence_penalty: float = 0.0  # over the answer, once per token that occurs
    frequency_penalty: float = 0.0  # over the answer, once per occurrence
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None  # None: another answer each time
    logprobs: int | None = None  # likeliest alternatives to report; 0: the chosen token only
    stop_ids: frozenset[int] | None = None  # None: the checkpoint's end of sequence

    def __post_init__(self) -> None:
        ranges = {
            "temperature": 0 <= self.temperature < math.inf,
            "top_k": self.top_k >= 0,
            "top_p": 0 < self.top_p <= 1,
            "min_p": 0 <= self.min_p <= 1,
            "repetition_penalty": 0 < self.repetition_penalty < math.inf,
            "presence_penalty": math.isfinite(self.presence_penalty),
            "frequency_penalty": math.isfinite(self.frequency_penalty),
            "logit_bias": all(map(math.isfinite, self.logit_bias.values())),
            "seed": self.seed is None or -(2**63) <= self.seed < 2**63,
            "logprobs": self.logprobs is None or self.logprobs >= 0,
        }
        for name, holds in ranges.items():
            if not holds:
                raise ValueError(f"{name} {getattr(self, name)}: out of range")

    @property
    def is_plain(self) -> bool:
        """Whether the likeliest token by the model is all that is wanted."""
        asked = self.temperature, self.logprobs, self.repetition_penalty
        shifted = self.presence_penalty, self.frequency_penalty, *self.logit_bias.values()
        return asked == (0, None, 1) and not any(shifted)

    def generator(self) -> torch.Generator | None:
        """The request's own source of chance; None where nothing is left to chance."""
        if self.temperature == 0:
            return None
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator


@dataclass(frozen=True)
class Choice:
    """A token; if asked for, its log probability and the likeliest tokens' with theirs."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def likeliest(logits_BV: Tensor) -> list[int | None]:
    """The token of each row's largest logit; None for a row that has no number somewhere."""
    if logits_BV.device.type == "cpu":  # where numpy takes a tenth of the time
        ids_B = torch.from_numpy(logits_BV.float().numpy().argmax(-1))
    else:
        ids_B = logits_BV.argmax(-1)
    values_B = logits_BV.gather(-1, ids_B[:, None])[:, 0]  # a NaN is larger than any number
    pairs = zip(values_B.tolist(), ids_B.tolist(), strict=True)
    return [token if math.isfinite(value) else None for value, token in pairs]


def choose(
    logits_V: Tensor,
    sampling: Sampling,
    prompt: Sequence[int],
    answer: Sequence[int],
    generator: torch.Generator | None,
    forced: int | None = None,
) -> Choice:
    """The next token after `prompt` and `answer`. Logits are float32 on the CPU.

    Nothing is drawn for a token that is forced.

    Raises:
        FloatingPointError: logits that are no numbers.
    """
    if not bool(torch.isfinite(logits_V).all()):
        raise FloatingPointError("the model's logits are not finite")
    token = forced
    if token is None:
        token = _next(penalized(logits_V, sampling, prompt, answer), sampling, generator)
    if sampling.logprobs is None:
        return Choice(token)
    logprobs_V = logits_V.log_softmax(-1)
    values, ids = logprobs_V.topk(min(sampling.logprobs, len(logprobs_V)))
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return Choice(token, float(logprobs_V[token]), top)


def _next(scores_V: Tensor, sampling: Sampling, generator: torch.Generator | None) -> int:
    if generator is None:
        return int(scores_V.argmax())
    probabilities_V = warped(scores_V, sampling).softmax(-1)
    return int(torch.multinomial(probabilities_V, 1, generator=generator))


def penalized(
    logits_V: Tensor, sampling: Sampling, prompt: Sequence[int], answer: Sequence[int]
) -> Tensor:
    """Logits after bias and penalties; the given ones stay as they are."""
    scores_V = logits_V.clone()
    if sampling.logit_bias:
        ids = torch.tensor(list(sampling.logit_bias))
        scores_V[ids] += torch.tensor(list(sampling.logit_bias.values()))
    if sampling.repetition_penalty != 1:
        seen = torch.tensor([*prompt, *answer]).unique()
        penalty, old = sampling.repetition_penalty, scores_V[seen]
        scores_V[seen] = torch.where(old < 0, old * penalty, old / penalty)
    if answer and (sampling.presence_penalty or sampling.frequency_penalty):
        seen, counts = torch.tensor(answer).unique(return_counts=True)
        scores_V[seen] -= sampling.presence_penalty + sampling.frequency_penalty * counts
    return scores_V


def warped(scores_V: Tensor, sampling: Sampling) -> Tensor:
    """Logits over temperature, those that are out of reach at -inf; one is always in reach."""
    # a smaller divisor would be zero in float32
    scores_V = (scores_V - scores_V.max()) / max(sampling.temperature, 1e-6)
    if 0 < sampling.top_k < len(scores_V):
        least = scores_V.topk(sampling.top_k).values[-1]
        scores_V = scores_V.masked_fill(scores_V < least, -torch.inf)
    if sampling.top_p < 1:
        ordered, ids = scores_V.sort(descending=False)
        gone = ordered.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        gone[-1] = False
        scores_V = scores_V.masked_fill(gone.scatter(0, ids, gone), -torch.inf)
    if sampling.min_p > 0:
        probabilities_V = scores_V.softmax(-1)
        out = probabilities_V < sampling.min_p * probabilities_V.max()
        scores_V = scores_V.masked_fill(out, -torch.inf)
    return scores_V
