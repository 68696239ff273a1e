"""Requests to token ids, by the checkpoint's own tokenizer and chat template."""

import asyncio
from collections.abc import Sequence
from typing import Any

from star_elastic.serve.forcing import Marks
from star_elastic.serve.schema import BadRequest, ChatRequest, CompletionRequest, Message
from star_elastic.serve.schema.requests import TemplateArguments
from star_elastic.serve.schema.tokens import TokenizeRequest
from star_elastic.serve.template import ChatTemplate, TemplateFailed

_MANY = 4096  # characters, above which the event loop is not kept waiting
Prompt = tuple[int, ...]


class Prompts:
    """The prompts of requests, and whether they open the reasoning."""

    def __init__(self, tokenizer: Any, template: ChatTemplate | None, marks: Marks | None) -> None:
        """`tokenizer`: a fast one of transformers."""
        self._tokenizer, self._template, self._marks = tokenizer, template, marks

    @property
    def end_mark_tokens(self) -> int:
        """Tokens that it takes to end the reasoning."""
        return 0 if self._marks is None else len(self._marks.encode(self._marks.end))

    async def of(
        self, request: ChatRequest | CompletionRequest, thinks: bool
    ) -> tuple[tuple[Prompt, ...], bool]:
        """The prompts, and whether the reasoning is open at their end.

        Args:
            thinks: false tells the template so, where the request has not.

        Raises:
            BadRequest: no template, or one that refuses these messages; no token at all.
        """
        inside = False
        if isinstance(request, ChatRequest):
            text = await self._chat(request.messages, request.chat_template_kwargs, thinks)
            inside = self._marks is not None and text.rstrip().endswith(self._marks.start)
            prompts = [await self._encode(text, special=False)]
        else:
            prompts = [
                tuple(each) if not isinstance(each, str) else await self._encode(each, special=True)
                for each in request.prompt
            ]
        if not all(prompts):
            field = "messages" if isinstance(request, ChatRequest) else "prompt"
            raise BadRequest(f"{field}: no token at all", field)
        return tuple(prompts), inside

    async def tokenize(self, wanted: TokenizeRequest) -> Prompt:
        """The ids of a text or of messages, perhaps none.

        Raises:
            BadRequest: as `of`.
        """
        if wanted.messages is None:
            return await self._encode(wanted.prompt or "", wanted.add_special_tokens)
        text = await self._chat(wanted.messages, wanted.chat_template_kwargs, thinks=True)
        return await self._encode(text, special=False)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids, special tokens included."""
        return self._tokenizer.decode(list(ids))

    async def _chat(
        self, messages: Sequence[Message], arguments: TemplateArguments, thinks: bool
    ) -> str:
        if self._template is None:
            raise BadRequest(
                "messages: this checkpoint has no chat template; use /v1/completions", "messages"
            )
        said = arguments.model_dump(exclude_none=True)
        if not thinks:
            said.setdefault("enable_thinking", False)
        turns = [message.model_dump(exclude_none=True) for message in messages]
        try:
            return await self._template.render(turns, add_generation_prompt=True, **said)
        except TemplateFailed as error:
            raise BadRequest(f"messages: {error}", "messages") from None

    async def _encode(self, text: str, special: bool) -> Prompt:
        if len(text) > _MANY:
            return await asyncio.to_thread(self._ids, text, special)
        return self._ids(text, special)

    def _ids(self, text: str, special: bool) -> Prompt:
        return tuple(self._tokenizer.backend_tokenizer.encode(text, add_special_tokens=special).ids)
