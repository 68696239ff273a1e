"""What is sent back: OpenAI's shapes, with `elastic` beside them.

Reasoning goes by both names in use, `reasoning` and `reasoning_content`.
"""

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, model_serializer
from pydantic.functional_serializers import SerializerFunctionWrapHandler

FinishReason = Literal["stop", "length"]
Piece = bytes


class Reply(BaseModel):
    """Made here, never read: unknown keys are our own mistakes."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Sparse(Reply):
    """Leaves out what is None, at this level."""

    @model_serializer(mode="wrap")
    def _without_none(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if value is not None}


class TokenDetails(Reply):
    reasoning_tokens: int = 0


class PromptDetails(Reply):
    cached_tokens: int = 0


class Usage(Reply):
    """Tokens of a request; the reasoning's are among the completion's."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails = PromptDetails()
    completion_tokens_details: TokenDetails = TokenDetails()

    @classmethod
    def of(cls, prompt: int, completion: int, reasoning: int = 0, cached: int = 0) -> "Usage":
        return cls(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=PromptDetails(cached_tokens=cached),
            completion_tokens_details=TokenDetails(reasoning_tokens=reasoning),
        )


class ElasticReport(Sparse):
    """Which sizes answered, how much each, and why; and what of the request was ignored."""

    sizes: list[str]
    tokens: dict[str, int]  # size -> completion tokens
    switches: int = 0
    routed_because: list[str]
    ignored: list[str] = []
    thinking_budget: int | None = None


class TokenLogprob(Reply):
    """A token's text, its bytes (those of a part of a character have no text), its logprob."""

    token: str
    logprob: float
    bytes: list[int]

    @classmethod
    def of(cls, piece: Piece, logprob: float) -> "TokenLogprob":
        return cls(
            token=piece.decode("utf-8", "replace"), logprob=max(logprob, -9999.0), bytes=[*piece]
        )


class ChatTokenLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob] = []


class ChatLogprobs(Reply):
    content: list[ChatTokenLogprob]


class CompletionLogprobs(Reply):
    """The older form: parallel lists, one entry a token."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class Answer(Reply):
    """The message of a whole answer. `content` is never None: clients concatenate it."""

    role: Literal["assistant"] = "assistant"
    content: str
    reasoning: str | None = None
    reasoning_content: str | None = None
    refusal: None = None

    @classmethod
    def of(cls, content: str, reasoning: str | None = None) -> "Answer":
        return cls(content=content, reasoning=reasoning, reasoning_content=reasoning)


class Delta(Sparse):
    """What a chunk adds; a key that adds nothing is absent."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None

    @classmethod
    def of(cls, content: str = "", reasoning: str = "", first: bool = False) -> "Delta":
        thought = reasoning or None
        return cls(
            role="assistant" if first else None,
            content=content or ("" if first else None),
            reasoning=thought,
            reasoning_content=thought,
        )


class ChatChoice(Reply):
    index: int
    message: Answer
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason


class ChunkChoice(Reply):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None


class CompletionChoice(Reply):
    """Of a whole completion, or of a chunk of one (then without a reason until the last)."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None


class ChatCompletion(Sparse):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int  # seconds since 1970
    model: str
    choices: list[ChatChoice]
    usage: Usage
    elastic: ElasticReport | None = None


class ChatChunk(Sparse):
    """The last one, if usage was asked for, has no choices."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    elastic: ElasticReport | None = None


class Completion(Sparse):
    """Also a chunk of one."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    elastic: ElasticReport | None = None


class Model(Sparse):
    """An id that `model` may have; `size` is absent where a policy chooses."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "star-elastic"
    max_model_len: int | None = None
    size: str | None = None
    thinking_budgets: dict[str, int] | None = None  # reasoning_effort -> tokens


class ModelList(Reply):
    object: Literal["list"] = "list"
    data: list[Model]


def model_list(
    served: str,
    sizes: Sequence[str],
    created: int,
    max_model_len: int | None = None,
    efforts: dict[str, int] | None = None,
) -> ModelList:
    """The policy's id first, then one for each size."""
    ids: list[tuple[str, str | None]] = [(served, None), *((f"{served}:{s}", s) for s in sizes)]
    return ModelList(
        data=[
            Model(
                id=name,
                created=created,
                max_model_len=max_model_len,
                size=size,
                thinking_budgets=efforts,
            )
            for name, size in ids
        ]
    )
