"""One request at one replica: send it, read the stream, tell errors apart.

The stream is read only as fast as pieces are taken: what the caller does not take stays in the
socket, until the server behind is held up. A connection serves one request. So closing it tells
the server that nobody listens, and no answer is lost to a connection that had gone stale.
"""

import asyncio
import json
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from email.utils import parsedate_to_datetime
from typing import Any, NoReturn

import httpx2

from star_elastic.serve.answers import AnswerFailed, Asked, Piece
from star_elastic.serve.schema import ChatRequest
from star_elastic.serve.upstream.chunks import Transcript, parsed
from star_elastic.serve.upstream.errors import Garbled, Unusable, UpstreamRefused
from star_elastic.serve.upstream.outgoing import body_of, path_of
from star_elastic.serve.upstream.replica import Replica
from star_elastic.serve.upstream.sse import Event, SseParser
from star_elastic.serve.upstream.watch import read_most

_MOST_OF_AN_ERROR, _MOST_WAIT_S = 2**16, 3600.0
_DONE = "[DONE]"
# Statuses that say how the server is set up, and nothing about the request
_OURS_TO_MEND = (401, 403, 404, 405, 407)


class Call:
    """A request on its way."""

    def __init__(
        self,
        client: httpx2.AsyncClient,
        replica: Replica,
        asked: Asked,
        confidence: bool,
        budget: bool = True,
    ) -> None:
        """Args: confidence, budget: see `body_of`."""
        self._client, self._replica, self._asked = client, replica, asked
        self._settings = replica.settings
        assert replica.model is not None, "chosen, but not usable"
        context = replica.context_tokens
        self._body = body_of(asked, replica.model, confidence, context, budget)
        chat = isinstance(asked.request, ChatRequest)
        self._transcript = Transcript(asked.request.answers, chat)
        self._clock = asyncio.get_running_loop().time
        self._began = False  # whether a piece was handed on
        self._patient_until: float | None = None  # once only the count of tokens is missing

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """The answers' pieces.

        Raises:
            Unusable: before the first piece.
            UpstreamRefused: before the first piece.
            AnswerFailed: 504 if it is too slow, 502 after the first piece.
        """
        deadline = self._clock() + self._settings.first_byte_s
        response = await self._send()
        try:
            if response.status_code != 200:
                await self._refused(response)
            kind = response.headers.get("content-type", "")
            if not kind.startswith("text/event-stream"):
                raise Unusable(f"it answers in {kind[:80]!r}, not in events")
            async with aclosing(self._read(response, deadline)) as pieces:
                async for piece in pieces:
                    self._began = True
                    yield piece
        finally:
            await response.aclose()

    async def _send(self) -> httpx2.Response:
        """Until the head of the reply is there."""
        replica = self._replica
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
        request = self._client.build_request(
            "POST",
            replica.spec.url + path_of(self._asked),
            content=json.dumps(self._body).encode(),
            headers=headers | replica.spec.headers(),
        )
        try:
            async with asyncio.timeout(self._settings.first_byte_s):
                return await self._client.send(request, stream=True)
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            raise Unusable(f"no connection: {_named(error)}", unreachable=True) from None
        except httpx2.TransportError as error:
            raise Unusable(f"the connection was lost: {_named(error)}") from None
        except TimeoutError:
            self._late()

    async def _read(
        self, response: httpx2.Response, deadline: float
    ) -> AsyncGenerator[Piece, None]:
        """Until all is told. `deadline`: of the first byte."""
        parser = SseParser(self._settings.max_line, self._settings.max_stream)
        chunks = response.aiter_raw()
        wait = max(0.0, deadline - self._clock())
        while (chunk := await self._next(chunks, wait)) is not None:
            wait = self._settings.between_bytes_s
            try:
                for event in parser.feed(chunk):
                    if event.data.strip() == _DONE:
                        chunk = None
                        break
                    for piece in self._heard(event):
                        yield piece
            except Garbled as error:
                if not self._transcript.complete:
                    self._fail(f"garbled: {error}")
                chunk = None
            if chunk is None or (self._transcript.complete and self._transcript.counted):
                break
        if not self._transcript.complete:
            self._fail("the stream ended before the answer")
        for piece in self._transcript.end():
            yield piece

    async def _next(self, chunks: AsyncIterator[bytes], wait: float) -> bytes | None:
        """The next bytes, None if the stream has ended; or should have, once all is told."""
        complete = self._transcript.complete
        if complete:
            now = self._clock()
            self._patient_until = self._patient_until or now + self._settings.usage_s
            wait = max(0.0, self._patient_until - now)
        try:
            async with asyncio.timeout(wait):
                return await anext(chunks, None)
        except httpx2.TransportError as error:
            if complete:
                return None
            self._fail(f"the connection was lost: {_named(error)}")
        except TimeoutError:
            if complete:
                return None
            self._late()

    def _heard(self, event: Event) -> list[Piece]:
        """Raises: Garbled, Unusable, UpstreamRefused, AnswerFailed"""
        chunk = parsed(event.data)
        if event.name == "error" or chunk.get("error") is not None:
            self._told_error(chunk)
        try:
            return self._transcript.read(chunk)
        except AnswerFailed as error:
            self._fail(str(error))

    def _told_error(self, chunk: dict[str, Any]) -> NoReturn:
        """An error in the middle of the stream; of the request only if nothing was shown yet."""
        message, param, code = _error_of(chunk)
        status = int(code) if code is not None and code.isascii() and code.isdigit() else 500
        if status in (400, 413, 422) and not self._began:
            raise UpstreamRefused(message, status, param)
        self._fail(f"it says: {message}")

    async def _refused(self, response: httpx2.Response) -> NoReturn:
        """The reply is an error."""
        status = response.status_code
        try:
            async with asyncio.timeout(self._settings.between_bytes_s):
                body = await read_most(response, _MOST_OF_AN_ERROR)
            message, param, code = _error_of(parsed(body.decode("utf-8", "replace")))
        except (httpx2.TransportError, TimeoutError, Garbled):
            message, param, code = f"status {status}", None, None
        if status in (429, 503):
            after = _seconds(response.headers.get("retry-after"))
            raise Unusable(f"{status}: {message}", busy=True, retry_after_s=after)
        if status == 404:
            self._replica.forget()  # another model may have taken its place
        if status in _OURS_TO_MEND or not 400 <= status < 500:
            raise Unusable(f"{status}: {message}")
        raise UpstreamRefused(message, status, param, None if code == str(status) else code)

    def _fail(self, why: str) -> NoReturn:
        if self._began:
            raise AnswerFailed(f"the server behind failed: {why}", 502) from None
        raise Unusable(why) from None

    def _late(self) -> NoReturn:
        settings = self._settings
        seconds = settings.between_bytes_s if self._began else settings.first_byte_s
        why = f"the server behind was silent for {seconds:g} seconds"
        raise AnswerFailed(why, 504) from None


def _error_of(body: dict[str, Any]) -> tuple[str, str | None, str | None]:
    """Message, field and code of an error, in OpenAI's shape or about so."""
    error = body.get("error", body)
    if not isinstance(error, dict):
        return str(error)[:1000], None, None
    message = error.get("message") or error.get("detail") or "an error without a message"
    param, code = error.get("param"), error.get("code")
    return (
        str(message)[:1000],
        param[:200] if isinstance(param, str) else None,
        str(code)[:200] if isinstance(code, str | int) else None,
    )


def _seconds(retry_after: str | None) -> float | None:
    """A `Retry-After`, which is seconds or a date; None if it is neither."""
    if retry_after is None:
        return None
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(retry_after).timestamp() - time.time()
        except ValueError:
            return None
    return min(max(seconds, 0.0), _MOST_WAIT_S) if math.isfinite(seconds) else None


def _named(error: Exception) -> str:
    return f"{type(error).__name__} {error}".strip()[:200]
