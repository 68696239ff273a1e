"""The bodies of `/tokenize` and `/detokenize`, as vLLM has them."""

from typing import Annotated

from pydantic import Field, model_validator

from star_elastic.serve.schema.errors import FieldError
from star_elastic.serve.schema.requests import (
    MAX_CHARACTERS,
    MAX_TOKENS,
    Known,
    Message,
    TemplateArguments,
    TokenId,
)


class TokenizeRequest(Known):
    """A text, or messages for the chat template."""

    model: str | None = Field(default=None, max_length=256)
    prompt: Annotated[str, Field(max_length=MAX_CHARACTERS)] | None = None
    messages: list[Message] | None = Field(
        default=None, min_length=1, max_length=4096, fail_fast=True
    )
    add_special_tokens: bool = True
    chat_template_kwargs: TemplateArguments = TemplateArguments()

    @model_validator(mode="after")
    def _one(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise FieldError("prompt", "either a prompt or messages")
        length = sum(message.characters for message in self.messages or ())
        if length > MAX_CHARACTERS:
            raise FieldError("messages", f"{length} characters; at most {MAX_CHARACTERS} are read")
        return self


class DetokenizeRequest(Known):
    """Token ids."""

    model: str | None = Field(default=None, max_length=256)
    tokens: list[TokenId] = Field(max_length=MAX_TOKENS, fail_fast=True)
