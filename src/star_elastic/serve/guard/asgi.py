"""The ASGI interface by its names, and refusals in the shape that OpenAI's clients read."""

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from contextlib import suppress
from typing import Any

from star_elastic.serve.schema.errors import error_body

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = Sequence[tuple[bytes, bytes]]  # names in lower case

_LINGER_SECONDS = 1.0


def values_of(scope: Scope, name: bytes) -> list[str]:
    """All values of a header."""
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]


def has_body(scope: Scope) -> bool:
    """Does the request say that a body follows?"""
    lengths = values_of(scope, b"content-length")
    return bool(values_of(scope, b"transfer-encoding")) or any(size != "0" for size in lengths)


async def refuse(
    scope: Scope,
    receive: Receive,
    send: Send,
    status: int,
    message: str,
    *,
    kind: str = "invalid_request_error",
    code: str | None = None,
    headers: Headers = (),
) -> None:
    """Answer with an error; of a body that nobody read, the connection is closed after it.

    A connection closed on unread bytes is reset, and with it the answer that is still on its way.
    So what still arrives is thrown away, for a second at most.
    """
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    body = json.dumps(error_body(message, kind, code=code)).encode()
    lingers = has_body(scope)
    closing = [(b"connection", b"close")] if lingers else []
    sizes = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    start = {"status": status, "headers": [*sizes, *headers, *closing]}
    await send({"type": "http.response.start", **start})
    await send({"type": "http.response.body", "body": body, "more_body": lingers})
    if lingers:
        with suppress(TimeoutError):
            async with asyncio.timeout(_LINGER_SECONDS):
                while (await receive()).get("more_body"):
                    pass
        await send({"type": "http.response.body", "body": b"", "more_body": False})
