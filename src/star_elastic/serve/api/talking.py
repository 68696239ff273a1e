"""The routes that answer: chat and completions, whole or streamed, until the client goes away."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from star_elastic.serve.answering import Answering
from star_elastic.serve.answers import AnswerFailed, Piece
from star_elastic.serve.api.replying import Replying
from star_elastic.serve.schema import ChatRequest, CompletionRequest, error_body
from star_elastic.serve.service import Service

SIZE_HEADER = "x-elastic-size"
_QUALITY_HEADER = "x-elastic-quality"
_GONE = 499  # as nginx notes it; nobody reads it
Result = TypeVar("Result")


class ClientGone(Exception):
    """Nobody waits for this answer any more."""


def routes(service: Service) -> APIRouter:
    """`/v1/chat/completions` and `/v1/completions` of a service."""
    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await _answer(service, request, ChatRequest)

    @router.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _answer(service, request, CompletionRequest)

    return router


async def _answer(service: Service, request: Request, kind: Any) -> Response:
    body = await request.body()
    key, quality = request.scope.get("state", {}).get("key"), request.headers.get(_QUALITY_HEADER)
    try:
        answering = await _unless_gone(request, service.begin(kind, body, key, quality))
    except ClientGone:
        return Response(status_code=_GONE)
    try:
        pieces = answering.pieces()
        replying = Replying(answering, chat=kind is ChatRequest)
        if answering.asked.request.stream:
            # what can be refused is refused before the first byte, with its own status
            first = await _unless_gone(request, anext(pieces))
            return _Stream(service, answering, replying, first, pieces)
        reply = await _unless_gone(request, _whole(replying, pieces))
    except ClientGone:
        service.end(answering, "gone")
        return Response(status_code=_GONE)
    except BaseException:
        service.end(answering, "failed")
        raise
    service.end(answering, "ok")
    return JSONResponse(reply, headers={SIZE_HEADER: answering.size})


async def _whole(replying: Replying, pieces: AsyncGenerator[Piece, None]) -> dict[str, Any]:
    async with aclosing(pieces):
        async for piece in pieces:
            replying.add(piece)
    return replying.whole().model_dump(mode="json")


class _Stream(StreamingResponse):
    """Server-sent events. However it is left, the request is ended and what it held is free."""

    def __init__(
        self,
        service: Service,
        answering: Answering,
        replying: Replying,
        first: Piece,
        pieces: AsyncGenerator[Piece, None],
    ) -> None:
        self._service, self._answering, self._replying = service, answering, replying
        self._pieces = pieces
        headers = {SIZE_HEADER: answering.size, "cache-control": "no-store"}
        super().__init__(self._events(first), media_type="text/event-stream", headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._pieces):
            try:
                await super().__call__(scope, receive, send)
            finally:
                self._service.end(self._answering, "gone")  # unless it has ended well

    async def _events(self, first: Piece) -> AsyncIterator[bytes]:
        for chunk in self._replying.chunks(first):
            yield _event(chunk.model_dump_json())
        try:
            async for piece in self._pieces:
                for chunk in self._replying.chunks(piece):
                    yield _event(chunk.model_dump_json())
        except AnswerFailed as error:
            self._service.end(self._answering, "failed")
            yield _event(json.dumps(error_body(str(error), "server_error", code="answer_failed")))
        else:
            self._service.end(self._answering, "ok")
        yield _event("[DONE]")


def _event(data: str) -> bytes:
    return f"data: {data}\n\n".encode()


async def _unless_gone(request: Request, work: Awaitable[Result]) -> Result:
    """What `work` returns, unless the client closes the connection first.

    Raises:
        ClientGone: it did; `work` was cancelled and has ended.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
