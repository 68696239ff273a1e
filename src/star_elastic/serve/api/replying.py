"""Pieces of answers to OpenAI's replies: whole, or chunk by chunk."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from pydantic import BaseModel

from star_elastic.serve.answering import Answering
from star_elastic.serve.answers import Piece
from star_elastic.serve.schema import (
    Answer,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatLogprobs,
    ChatTokenLogprob,
    ChunkChoice,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    Delta,
)
from star_elastic.serve.schema.replies import FinishReason
from star_elastic.serve.text import Parts


@dataclass
class _Whole:
    """One answer so far."""

    parts: Parts = Parts()
    logprobs: list[ChatTokenLogprob] = field(default_factory=list)
    finish: FinishReason | None = None
    begun: bool = False
    offset: int = 0  # characters of the text that log probabilities were told of


class Replying:
    """Makes the replies of one request. `chat` has messages, else they are completions."""

    def __init__(self, answering: Answering, chat: bool) -> None:
        self._answering, self._chat = answering, chat
        request = answering.asked.request
        self._wants_logprobs = request.top is not None
        self._reasons = request.include_reasoning
        options = request.stream_options
        self._wants_usage = options is not None and options.include_usage
        self._answers = [_Whole() for _ in range(request.answers)]
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{answering.id}",
            "created": int(time.time()),
            "model": request.model,
        }

    def add(self, piece: Piece) -> None:
        """Take note of a piece, for `whole`."""
        answer = self._answers[piece.index]
        answer.parts += piece.parts
        answer.logprobs += piece.logprobs
        answer.finish = piece.finish or answer.finish

    def whole(self) -> BaseModel:
        """The reply, when all pieces were added."""
        answering = self._answering
        tail = {"usage": answering.usage(), "elastic": answering.report()}
        if self._chat:
            choices = [self._chat_choice(n, each) for n, each in enumerate(self._answers)]
            return ChatCompletion(**self._head, choices=choices, **tail)
        texts = [
            CompletionChoice(
                index=n,
                text=each.parts.content,
                logprobs=self._completion_logprobs(each, each.logprobs),
                finish_reason=each.finish,
            )
            for n, each in enumerate(self._answers)
        ]
        return Completion(**self._head, choices=texts, **tail)

    def chunks(self, piece: Piece) -> Iterator[BaseModel]:
        """What to send for a piece; the last one carries the report on the sizes."""
        answer = self._answers[piece.index]
        answer.finish = piece.finish or answer.finish
        parts = piece.parts if self._reasons else Parts(content=piece.parts.content)
        adds = parts.content or parts.reasoning or piece.logprobs or piece.finish
        if answer.begun and not adds:
            return
        choice = self._chunk_choice(answer, piece, parts)
        answer.begun = True
        last = all(each.finish for each in self._answers)
        report = self._answering.report() if last else None
        yield self._chunk([choice], elastic=report)
        if last and self._wants_usage:
            yield self._chunk([], usage=self._answering.usage(), elastic=report)

    def _chunk(self, choices: Sequence[BaseModel], **tail: BaseModel | None) -> BaseModel:
        kind = ChatChunk if self._chat else Completion
        return kind(**self._head, choices=choices, **tail)  # type: ignore[arg-type]

    def _chunk_choice(self, answer: _Whole, piece: Piece, parts: Parts) -> BaseModel:
        if not self._chat:
            return CompletionChoice(
                index=piece.index,
                text=parts.content,
                logprobs=self._completion_logprobs(answer, piece.logprobs),
                finish_reason=piece.finish,
            )
        return ChunkChoice(
            index=piece.index,
            delta=Delta.of(parts.content, parts.reasoning, first=not answer.begun),
            logprobs=self._chat_logprobs(piece.logprobs),
            finish_reason=piece.finish,
        )

    def _chat_choice(self, index: int, answer: _Whole) -> ChatChoice:
        assert answer.finish is not None, "an answer without an end"
        reasoning = answer.parts.reasoning if self._reasons else ""
        return ChatChoice(
            index=index,
            message=Answer.of(answer.parts.content, reasoning or None),
            logprobs=self._chat_logprobs(answer.logprobs) if self._wants_logprobs else None,
            finish_reason=answer.finish,
        )

    def _chat_logprobs(self, logprobs: Sequence[ChatTokenLogprob]) -> ChatLogprobs | None:
        if not self._wants_logprobs:
            return None
        return ChatLogprobs(content=list(logprobs))

    def _completion_logprobs(
        self, answer: _Whole, logprobs: Sequence[ChatTokenLogprob]
    ) -> CompletionLogprobs | None:
        """As parallel lists; offsets go on from those told before."""
        if not self._wants_logprobs:
            return None
        offsets = []
        for each in logprobs:
            offsets.append(answer.offset)
            answer.offset += len(each.token)
        return CompletionLogprobs(
            tokens=[each.token for each in logprobs],
            token_logprobs=[each.logprob for each in logprobs],
            top_logprobs=[{top.token: top.logprob for top in e.top_logprobs} for e in logprobs],
            text_offset=offsets,
        )
