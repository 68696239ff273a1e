"""The body of a request: received whole and in time, or not at all."""

import asyncio
from typing import Any

from star_elastic.serve.guard.asgi import App, Message, Receive, Scope, Send, has_body, refuse
from star_elastic.serve.guard.asgi import values_of as values

_WITH_BODY = {"POST", "PUT", "PATCH"}


class Body:
    """Hands the app a whole body of JSON: 413 if too long, 408 if too slow, 415 if something else.

    What all requests together have sent so far, and are not through with, has a limit too: many
    slow ones must not add up to all the memory (503).
    """

    def __init__(
        self,
        app: App,
        max_bytes: int = 8 * 2**20,
        seconds: float = 30.0,
        max_together: int = 256 * 2**20,
    ) -> None:
        """
        Args:
            max_bytes: of one body.
            seconds: from the end of the headers to the end of the body.
            max_together: bytes of all bodies that are being received.
        """
        self._app, self._max, self._seconds = app, max_bytes, seconds
        self._max_together, self._together = max_together, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not (has_body(scope) or scope["method"] in _WITH_BODY):
            await self._app(scope, receive, send)
            return
        try:
            _check_type(scope, sent=has_body(scope))
            self._check_length(max(map(int, values(scope, b"content-length")), default=0))
            body = await self._received(receive)
            if body is None:  # the client left
                return
            _check_type(scope, sent=bool(body))
        except _Unfit as error:
            await refuse(scope, receive, send, **error.reply)
            return
        await self._app(scope, _then(body, receive), send)

    async def _received(self, receive: Receive) -> bytes | None:
        """The body; None if there will be no more of it.

        Raises:
            _Unfit: too long, too slow, or there is no room.
        """
        body = bytearray()
        try:
            async with asyncio.timeout(self._seconds):
                while (message := await receive())["type"] == "http.request":
                    piece = message.get("body", b"")
                    body += piece
                    self._together += len(piece)
                    self._check_length(len(body))
                    if not message.get("more_body"):
                        return bytes(body)
        except TimeoutError:
            message = f"the request's body did not arrive within {self._seconds:g} s"
            raise _Unfit(408, message, "request_timeout") from None
        finally:
            self._together -= len(body)
        return None

    def _check_length(self, size: int) -> None:
        if size > self._max:
            message = f"the request's body is longer than {self._max} bytes"
            raise _Unfit(413, message, "request_too_large")
        if self._together > self._max_together:
            message = "too many long requests at once; try again"
            more = {"kind": "server_error", "headers": [(b"retry-after", b"1")]}
            raise _Unfit(503, message, "overloaded", **more)


class _Unfit(Exception):
    """A body that the app will not see, and what `refuse` is to say."""

    def __init__(self, status: int, message: str, code: str, **more: Any) -> None:
        super().__init__(message)
        self.reply = {"status": status, "message": message, "code": code, **more}


def _then(body: bytes, receive: Receive) -> Receive:
    """The body in one message; after it, what really happens."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return messages.pop() if messages else await receive()

    return replayed


def _check_type(scope: Scope, sent: bool) -> None:
    """Raises: _Unfit: a body is sent, in a form that is not read here."""
    for encoding in values(scope, b"content-encoding"):
        if encoding.strip().lower() != "identity":  # nothing is unpacked: a bomb stays small
            message = f"Content-Encoding: {encoding[:80]!r} is not supported; send plain JSON"
            raise _Unfit(415, message, "unsupported_media_type")
    types = values(scope, b"content-type")
    if sent and scope["method"] in _WITH_BODY and not (len(types) == 1 and _is_json(types[0])):
        said = repr(types[0][:80]) if types else "nothing"
        message = f"Content-Type: application/json is expected, not {said}"
        raise _Unfit(415, message, "unsupported_media_type")


def _is_json(content_type: str) -> bool:
    name, *parameters = (part.strip().lower() for part in content_type.split(";"))
    utf8 = {"", "charset=utf-8", 'charset="utf-8"', "charset=utf8"}
    return name == "application/json" and utf8.issuperset(parameters)
