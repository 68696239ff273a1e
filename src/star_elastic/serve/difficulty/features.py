"""What is known of a request before a size is chosen, as named numbers.

Of the prompt: counts and shares that mean something in any language and for any tokenizer. Of the
probe, the small size's first few greedy tokens: how sure it was of them. All of it is cheap and
bounded, and the same input gives the same numbers.
"""

import math
import re
from collections.abc import Sequence
from typing import Protocol

Probe = Sequence[Sequence[float]]  # per token the likeliest tokens' log probabilities, best first

PROMPT = (
    *("log_characters", "log_tokens", "tokens_per_character", "log_words", "log_lines"),
    *("digits", "log_numbers", "longest_number", "operators", "brackets", "capitals"),
    *("not_ascii", "new_words", "word_length"),
)
PROBE = (
    *("first_logprob", "mean_logprob", "least_logprob", "mean_entropy", "most_entropy"),
    *("mean_margin", "least_margin", "unsure_tokens"),
)
NAMES = PROMPT + PROBE

_MOST_CHARACTERS = 8_192  # read of a prompt: half from its beginning, half from its end
_LEAST_LOGPROB = -30.0  # in nats; below it log probabilities only tell of rounding


class Told(Protocol):
    """What the engine tells of one token, see `serve.engine.Event`."""

    @property
    def token(self) -> int | None: ...
    @property
    def top(self) -> tuple[tuple[int, float], ...]: ...


def probe_of(events: Sequence[Told], tokens: int) -> list[list[float]]:
    """The probe out of the first events of a request that asked for `logprobs`."""
    told = [event for event in events if event.token is not None][:tokens]
    return [[logprob for _, logprob in event.top] for event in told]


def features(text: str, prompt_tokens: int, probe: Probe = ()) -> dict[str, float]:
    """The named numbers of a request, finite whatever comes in.

    Args:
        text: what was asked; of a conversation, see `conversation`.
        prompt_tokens: of the prompt as the model reads it.
        probe: empty if there is none; its features are missing then.
    """
    found = _of_prompt(text, prompt_tokens)
    return found | _of_probe(probe) if probe else found


def conversation(contents: Sequence[str]) -> str:
    """The text of a conversation's turns."""
    return "\n".join(contents)


def _of_prompt(text: str, tokens: int) -> dict[str, float]:
    half = _MOST_CHARACTERS // 2
    read = text if len(text) <= 2 * half else text[:half] + text[-half:]
    words, count = read.split(), max(1, len(read))
    runs = [len(run) for run in re.findall(r"\d+", read)]
    return {
        "log_characters": math.log1p(len(text)),
        "log_tokens": math.log1p(tokens),
        "tokens_per_character": min(4.0, tokens / max(1, len(text))),
        "log_words": math.log1p(len(words)),
        "log_lines": math.log1p(read.count("\n")),
        "digits": sum(runs) / count,
        "log_numbers": math.log1p(len(runs)),
        "longest_number": float(min(20, max(runs, default=0))),
        "operators": sum(map(read.count, "+-*/=<>^%")) / count,
        "brackets": sum(map(read.count, "()[]{}")) / count,
        "capitals": sum(map(str.isupper, read)) / count,
        "not_ascii": 1 - len(read.encode("ascii", "ignore")) / count if read else 0.0,
        "new_words": len(set(words)) / max(1, len(words)),
        "word_length": min(40.0, sum(map(len, words)) / max(1, len(words))),
    }


def _of_probe(probe: Probe) -> dict[str, float]:
    tops = [[max(_LEAST_LOGPROB, each) for each in top] or [0.0] for top in probe]
    first = [top[0] for top in tops]
    entropies = [_entropy(top) for top in tops]
    margins = [math.exp(top[0]) - (math.exp(top[1]) if top[1:] else 0.0) for top in tops]
    return {
        "first_logprob": first[0],
        "mean_logprob": sum(first) / len(first),
        "least_logprob": min(first),
        "mean_entropy": sum(entropies) / len(entropies),
        "most_entropy": max(entropies),
        "mean_margin": sum(margins) / len(margins),
        "least_margin": min(margins),
        "unsure_tokens": sum(margin < 0.5 for margin in margins) / len(margins),
    }


def _entropy(logprobs: Sequence[float]) -> float:
    """In nats; what is not among the likeliest counts as one more token."""
    rest = 1 - sum(map(math.exp, logprobs))
    terms = [-math.exp(each) * each for each in logprobs]
    return sum(terms) - (rest * math.log(rest) if rest > 1e-6 else 0.0)
