"""How difficult a request is, asked before its size is chosen."""

from contextlib import aclosing
from dataclasses import replace
from typing import Any

from star_elastic.serve.answers import Asked, Backend
from star_elastic.serve.difficulty.features import Probe, conversation
from star_elastic.serve.difficulty.file import Difficulty
from star_elastic.serve.schema import ChatRequest

_TOPS = 20  # likeliest tokens of each that is probed


class Judge:
    """A fitted router at one share of the cost, with its probe of the smallest size."""

    def __init__(self, difficulty: Difficulty, share: float) -> None:
        """
        Args:
            share: of what all requests would cost at the largest size.

        Raises:
            ValueError: a share below what the router can do.
        """
        self.difficulty, self.thresholds = difficulty, difficulty.thresholds(share)
        self._probe_tokens = difficulty.setting(share).probe_tokens

    @property
    def smallest(self) -> str:
        """The size that is probed."""
        return self.difficulty.sizes[0]

    async def of(self, asked: Asked, backend: Backend) -> float | None:
        """From -1 to 1; None where a prompt is token ids, which have no features.

        Args:
            backend: of the smallest size.

        Raises:
            AnswerFailed: the probe failed.
        """
        text = _text(asked)
        if text is None:
            return None
        tokens = min(self._probe_tokens, asked.max_tokens)
        probe = await _probe(asked, backend, self.smallest, tokens) if tokens else []
        if self._probe_tokens and not probe:
            return None  # it had nothing to say
        return self.difficulty.of(text, asked.prompt_tokens, probe, self._probe_tokens)


def _text(asked: Asked) -> str | None:
    request = asked.request
    if isinstance(request, ChatRequest):
        return conversation([message.content for message in request.messages])
    texts = [prompt for prompt in request.prompt if isinstance(prompt, str)]
    return conversation(texts) if len(texts) == len(request.prompt) else None


async def _probe(asked: Asked, backend: Backend, size: str, tokens: int) -> Probe:
    """The smallest size's first greedy tokens after the first prompt: log probabilities."""
    said: dict[str, Any] = {"n": 1, "temperature": 0.0, "max_tokens": tokens, "stop": []}
    said |= {"stream": False, "stream_options": None}
    if isinstance(asked.request, ChatRequest):
        said |= {"logprobs": True, "top_logprobs": _TOPS, "max_completion_tokens": None}
    else:
        said |= {"logprobs": _TOPS, "prompt": asked.request.prompt[:1]}
    request = asked.request.model_copy(update=said)
    body = {name: value for name, value in {**asked.body, **said}.items() if value is not None}
    probing = replace(
        asked,
        request=request,
        body=body,
        prompts=asked.prompts[:1],
        max_tokens=tokens,
        thinking=None,
    )
    probe: list[list[float]] = []
    async with aclosing(backend.answers(probing, size, confidence=True)) as pieces:
        async for piece in pieces:
            probe += [[top.logprob for top in told.top_logprobs] for told in piece.logprobs]
    return probe
