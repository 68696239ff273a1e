"""What a request may say. Every number has bounds, every list and text a greatest length.

Where vLLM has a field of the same meaning it has vLLM's name. None stands for "not said": the
server fills in what the checkpoint's generation config says, or the defaults of its engine.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from star_elastic.serve.schema.errors import FieldError, shown
from star_elastic.serve.schema.thinking import UNLIMITED, Effort
from star_elastic.submodel import Strict

MAX_TOKENS = 2**20
MAX_ANSWERS = 128
MAX_BIASES = 1024
MAX_CHARACTERS = 2**22  # of all messages together
Flat = Annotated[str, Field(min_length=1, max_length=256)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class Known(BaseModel):
    """Wrong types and values are errors; unknown keys are let pass, see `body`."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)


class Elastic(Strict):
    """How the size is chosen, in a request to no size in particular.

    `max_latency_ms` is from arrival to the last token; `max_cost` in the unit of a size's price;
    `quality` is one of the operator's names.
    """

    size: str | None = Field(default=None, min_length=1, max_length=64)
    max_latency_ms: float | None = Field(default=None, gt=0, le=86_400_000)
    max_cost: float | None = Field(default=None, gt=0, le=1e15)
    quality: str | None = Field(default=None, min_length=1, max_length=64)


class StreamOptions(Known):
    include_usage: bool = False


class TemplateArguments(Strict):
    """`chat_template_kwargs`: what a client may hand to the checkpoint's chat template."""

    enable_thinking: bool | None = None


class Wanted(Known):
    """What both kinds of request share."""

    model: Flat
    n: int = Field(default=1, ge=1, le=MAX_ANSWERS)
    max_tokens: int | None = Field(default=None, ge=1, le=MAX_TOKENS)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, le=2**20)  # 0 and -1: all
    min_p: float | None = Field(default=None, ge=0, le=1)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, ge=0.1, le=10)
    logit_bias: dict[TokenId, Annotated[float, Field(ge=-100, le=100)]] = {}
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: list[Flat] = Field(default=[], max_length=16, fail_fast=True)
    stop_token_ids: list[TokenId] = Field(default=[], max_length=64, fail_fast=True)
    stream: bool = False
    stream_options: StreamOptions | None = None
    priority: int = Field(default=0, ge=-(2**31), lt=2**31)  # lower is earlier
    user: str | None = Field(default=None, max_length=256)
    elastic: Elastic = Elastic()
    thinking_token_budget: int | None = Field(default=None, ge=UNLIMITED, le=MAX_TOKENS)
    reasoning_effort: Effort | None = None
    include_reasoning: bool = True

    @field_validator("temperature")
    @classmethod
    def _computable(cls, temperature: float | None) -> float | None:
        """Logits divided by almost nothing are no numbers: greedy, or 0.01 at least (as vLLM)."""
        if temperature is None or temperature >= 0.01:
            return temperature
        return 0.0 if temperature < 1e-5 else 0.01

    @field_validator("stop", mode="before")
    @classmethod
    def _stops(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _biases(cls, bias: Any) -> Any:
        """JSON's keys are strings."""
        if not isinstance(bias, dict):
            return bias
        if len(bias) > MAX_BIASES:
            raise ValueError(f"{len(bias)} tokens; at most {MAX_BIASES} are read")
        for token in bias:
            digits = token.isascii() and token.isdigit() and len(token) <= 10
            if not digits or int(token) >= 2**31:
                raise ValueError(f"keys are token ids; {token[:80]!r} is none")
        return {int(token): value for token, value in bias.items()}

    @model_validator(mode="after")
    def _streams(self) -> "Wanted":
        if self.stream_options is not None and not self.stream:
            raise FieldError("stream_options", "only with stream = true")
        return self

    @property
    def max_output_tokens(self) -> int | None:
        """For each answer, the reasoning included."""
        return self.max_tokens

    @property
    def top(self) -> int | None:
        """Likeliest tokens to report beside each chosen one; None: no log probabilities at all."""
        return None

    @property
    def answers(self) -> int:
        """How many sequences this request makes."""
        return self.n


class Message(Known):
    """A turn of the conversation. Parts of text are joined by newlines, as vLLM does."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str
    name: str | None = Field(default=None, max_length=256)
    reasoning: str | None = None
    reasoning_content: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _texts(cls, message: Any) -> Any:
        if not isinstance(message, dict):
            return message
        for field in ("tool_calls", "function_call", "tool_call_id", "audio"):
            if message.get(field):
                raise FieldError(field, "this server does not offer it")
        return {**message, "content": _joined(message.get("content"))}

    @property
    def characters(self) -> int:
        texts = (self.content, self.name, self.reasoning, self.reasoning_content)
        return sum(len(text) for text in texts if text is not None)


def _joined(content: Any) -> Any:
    """Text as it is, and that of parts of text; anything else is left to be refused."""
    if not isinstance(content, list):
        return content
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else part
            raise FieldError("content", f"only parts of text are read, not {shown(kind)}")
        if not isinstance(part.get("text"), str):
            raise FieldError("content", "a part of text without its text")
    return "\n".join(part["text"] for part in content)


class ChatRequest(Wanted):
    """The body of `/v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1, max_length=4096, fail_fast=True)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=MAX_TOKENS)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    chat_template_kwargs: TemplateArguments = TemplateArguments()

    @model_validator(mode="after")
    def _consistent(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise FieldError("top_logprobs", "only with logprobs = true")
        old, new = self.max_tokens, self.max_completion_tokens
        if old is not None and new is not None and old != new:
            raise FieldError("max_completion_tokens", f"{new}, but max_tokens is {old}")
        if (length := sum(message.characters for message in self.messages)) > MAX_CHARACTERS:
            raise FieldError("messages", f"{length} characters; at most {MAX_CHARACTERS} are read")
        return self

    @property
    def max_output_tokens(self) -> int | None:
        said = self.max_completion_tokens
        return self.max_tokens if said is None else said

    @property
    def top(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


Prompts = list[str] | list[list[int]]


class CompletionRequest(Wanted):
    """The body of `/v1/completions`. One prompt is read as a list of one."""

    prompt: Prompts
    logprobs: int | None = Field(default=None, ge=0, le=20)

    @field_validator("prompt", mode="plain")
    @classmethod
    def _prompts(cls, prompt: Any) -> Prompts:
        """Checked by hand, as a union of lists would report every way in which it does not fit."""
        if isinstance(prompt, str) or (isinstance(prompt, list) and _are_ids(prompt)):
            prompt = [prompt]
        if not isinstance(prompt, list) or not 1 <= len(prompt) <= MAX_ANSWERS:
            raise ValueError(f"a text or token ids, or 1 to {MAX_ANSWERS} of them in a list")
        if all(isinstance(each, str) for each in prompt):
            if (length := sum(map(len, prompt))) > MAX_CHARACTERS:
                raise ValueError(f"{length} characters; at most {MAX_CHARACTERS} are read")
        elif not all(isinstance(each, list) and _are_ids(each) for each in prompt):
            raise ValueError("neither texts nor lists of token ids")
        return prompt

    @model_validator(mode="after")
    def _few(self) -> "CompletionRequest":
        if self.answers > MAX_ANSWERS:
            raise FieldError("n", f"{self.answers} answers in all; at most {MAX_ANSWERS} are given")
        return self

    @property
    def top(self) -> int | None:
        return self.logprobs

    @property
    def answers(self) -> int:
        return self.n * len(self.prompt)


def _are_ids(values: list[Any]) -> bool:
    if not 0 < len(values) <= MAX_TOKENS or set(map(type, values)) != {int}:
        return False
    return min(values) >= 0 and max(values) < 2**31
