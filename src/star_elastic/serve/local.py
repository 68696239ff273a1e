"""The engine here as a backend: an `Asked` to token ids, and tokens back to text."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace
from typing import Literal

from star_elastic.serve.answers import AnswerFailed, Asked, Piece
from star_elastic.serve.engine import Event, Request
from star_elastic.serve.forcing import Forcing, Marks
from star_elastic.serve.sampling import Sampling
from star_elastic.serve.schema import ChatTokenLogprob, TokenLogprob
from star_elastic.serve.text import Parts, Pieces, TextStream
from star_elastic.serve.worker import Told, Worker
from star_elastic.submodel import Fields

_ENDS: dict[str | None, Literal["stop", "length"]] = {"stop": "stop", "length": "length"}


@dataclass(frozen=True)
class Speech:
    """How this checkpoint's tokens become text, and when an answer is over."""

    pieces: Pieces
    end_ids: frozenset[int]
    marks: Marks | None = None  # None: it does not think
    defaults: Sampling = Sampling(temperature=1.0)  # where a request says nothing


class Local:
    """Answers with the engine of a worker, at every size that it serves."""

    def __init__(self, worker: Worker, speech: Speech) -> None:
        self._worker, self._speech = worker, speech
        self._names = {size: size for size in worker.engine.sizes}  # size -> the engine's name
        self._changes = 0

    @property
    def ready(self) -> bool:
        """Whether the engine's thread works."""
        return self._worker.alive

    async def answers(
        self, asked: Asked, size: str, confidence: bool = False
    ) -> AsyncGenerator[Piece, None]:
        """As `Backend.answers`."""
        wanted = range(asked.request.answers)
        texts = [self._text(asked) for _ in wanted]
        requests = [self._request(asked, size, index, confidence) for index in wanted]
        try:
            run = await self._worker.run(requests)
        except ValueError as error:
            raise AnswerFailed(str(error)) from None
        try:
            async for told in run.told():
                piece = self._piece(asked, told, texts[told.index])
                if piece.finish and not told.event.finish:
                    run.cancel(told.index)  # a stop string is no end to the engine
                yield piece
        finally:
            run.close()

    async def put(self, size: str, fields: Fields) -> None:
        """Answer at one size more, or at another one by this name: what is in flight goes on.

        Raises:
            ValueError: a size that the parent cannot hold.
        """
        self._changes += 1
        name, old = f"{size}#{self._changes}", self._names.get(size)
        await self._worker.call(lambda: self._worker.engine.add_size(name, fields))
        self._names[size] = name
        if old is not None:
            await self._worker.call(lambda: self._worker.engine.remove_size(old))

    async def remove(self, size: str) -> None:
        """Begin nothing more at a size; what is in flight goes on.

        Raises:
            ValueError: it is the last one.
        """
        await self._worker.call(lambda: self._worker.engine.remove_size(self._names[size]))
        del self._names[size]

    def _text(self, asked: Asked) -> TextStream:
        marks = self._speech.marks if asked.thinking is not None else None
        reasoning = marks.reasoning(asked.inside) if marks is not None else None
        return TextStream(self._speech.pieces, asked.request.stop, reasoning)

    def _request(self, asked: Asked, size: str, index: int, confidence: bool) -> Request:
        forcing = self._forcing(asked)
        return Request(
            prompt=asked.prompts[index // asked.request.n],
            size=self._names[size],
            max_tokens=asked.max_tokens,
            sampling=self._sampling(asked, index, confidence),
            priority=asked.request.priority,
            forced=() if forcing is None else forcing.first,
            watch=forcing,
            salt=asked.salt,
        )

    def _forcing(self, asked: Asked) -> Forcing | None:
        marks = self._speech.marks
        if asked.thinking is None or marks is None:
            return None
        return Forcing(self._speech.pieces, marks, asked.thinking.tokens, asked.inside)

    def _sampling(self, asked: Asked, index: int, confidence: bool) -> Sampling:
        wanted, speech = asked.request, self._speech
        said = {
            "temperature": wanted.temperature,
            "top_k": None if wanted.top_k is None else max(wanted.top_k, 0),
            "top_p": wanted.top_p,
            "min_p": wanted.min_p,
            "repetition_penalty": wanted.repetition_penalty,
        }
        return replace(
            speech.defaults,
            **{name: value for name, value in said.items() if value is not None},
            presence_penalty=wanted.presence_penalty,
            frequency_penalty=wanted.frequency_penalty,
            logit_bias=wanted.logit_bias,
            seed=None if wanted.seed is None else _nth_seed(wanted.seed, index),
            logprobs=0 if wanted.top is None and confidence else wanted.top,
            stop_ids=speech.end_ids | set(wanted.stop_token_ids),
        )

    def _piece(self, asked: Asked, told: Told, text: TextStream) -> Piece:
        """What an event adds.

        Raises:
            AnswerFailed: the engine failed on this request.
        """
        event, before = told.event, text.reasoning_tokens
        if event.finish in ("error", "cancelled"):
            raise AnswerFailed(f"the engine failed on this request: {event.error or event.finish}")
        parts = Parts()
        if event.token is not None and event.finish != "stop":  # the end itself is no text
            parts = text.push(event.token)
        finish = _ENDS.get(event.finish)
        if text.stopped is not None:
            finish = "stop"
        elif finish is not None:
            parts += text.finish()
        return Piece(
            index=told.index,
            parts=parts,
            tokens=int(event.token is not None),
            reasoning_tokens=text.reasoning_tokens - before,
            logprobs=self._logprobs(event),
            finish=finish,
            cached_tokens=event.cached_tokens,
            queued_s=told.queued_s,
        )

    def _logprobs(self, event: Event) -> tuple[ChatTokenLogprob, ...]:
        if event.token is None or event.logprob is None or event.finish == "stop":
            return ()
        chosen = TokenLogprob.of(self._bytes(event.token), event.logprob)
        top = [TokenLogprob.of(self._bytes(token), value) for token, value in event.top]
        return (ChatTokenLogprob(**chosen.model_dump(), top_logprobs=top),)

    def _bytes(self, token: int) -> bytes:
        pieces = self._speech.pieces
        return pieces[token] if token < len(pieces) else b""


def _nth_seed(seed: int, index: int) -> int:
    """Answers of one request differ, also where its seed is the largest there is."""
    return (seed + index + 2**63) % 2**64 - 2**63
