"""uvicorn's HTTP/1.1, with an end to everything.

As it is, uvicorn 0.54 waits for ever for the first byte of a connection and for the next byte of a
request: its one timer (`timeout_keep_alive`) runs between requests and stops at any byte. Its
`limit_concurrency` counts idle connections, so that these alone bring 503 to everybody. And a
client that stops reading an answer holds it for ever. Here a request has a deadline, a stalled
answer one too, and idle connections give way. Errors below the app are JSON as well.
"""

import asyncio
import functools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from star_elastic.serve.guard.connections import Connections
from star_elastic.serve.schema.errors import error_body

_BODY_GRACE_SECONDS = 1.0  # in which the app may answer 408 itself
_MAX_INCOMPLETE = 32 * 2**10  # bytes of headers before they are complete
_FREE_CHUNKS, _CHUNK = 1024, 128  # of a body: so many of any size, then so many bytes on average


@dataclass(frozen=True)
class Deadlines:
    """Seconds.

    `request`: from the opening of a connection, or the end of the last answer, to the last byte of
    the request. `stall`: in which a client that does not keep up must read 48 KiB of its answer.
    """

    request: float = 30.0
    stall: float = 60.0


class _Chunks(h11.Connection):
    """Refuses bodies in tiny chunks: 10 us each, and a read of 256 KiB holds 40,000 of one byte."""

    def __init__(self, max_incomplete: int) -> None:
        super().__init__(h11.SERVER, max_incomplete)
        self._left = 0

    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._left = _FREE_CHUNKS * _CHUNK
        elif isinstance(event, h11.Data):
            self._left += len(event.data) - _CHUNK
            if self._left < 0:
                raise h11.RemoteProtocolError("the body comes in chunks that are too small")
        return event


class GuardedProtocol(H11Protocol):
    """One connection."""

    def __init__(
        self, *args: Any, deadlines: Deadlines, open_now: Connections, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.conn = _Chunks(self.config.h11_max_incomplete_event_size or _MAX_INCOMPLETE)
        self._deadlines, self._open_now = deadlines, open_now
        self._request_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self._open_now.enter(self, self.client[0] if self.client else ""):
            self._wait(self._deadlines.request)
        else:
            self._refuse(503, "too many connections", "server_error", [("retry-after", "1")])

    def connection_lost(self, exc: Exception | None) -> None:
        self._open_now.leave(self)
        _cancel(self._request_timer)
        _cancel(self._stall_timer)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self.transport.is_closing():
            super().data_received(data)

    def handle_events(self) -> None:
        super().handle_events()
        if self.cycle and not self.cycle.more_body and not self.cycle.response_complete:
            _cancel(self._request_timer)
            self._open_now.works(self)

    def on_response_complete(self) -> None:
        self._open_now.waits(self)
        self._wait(self._deadlines.request)  # before a pipelined request is begun in there
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall_timer = self.loop.call_later(self._deadlines.stall, self.evict)

    def resume_writing(self) -> None:
        _cancel(self._stall_timer)
        super().resume_writing()

    def evict(self) -> None:
        """End the connection now; the app is told that the client left."""
        self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        error = sys.exc_info()[1]  # h11's, which knows better than its caller
        if isinstance(error, h11.RemoteProtocolError):
            self._refuse(error.error_status_hint, f"no valid HTTP request: {error}"[:200])
        else:
            self._refuse(400, msg)

    def _wait(self, seconds: float) -> None:
        _cancel(self._request_timer)
        self._request_timer = self.loop.call_later(seconds, self._expired)

    def _expired(self) -> None:
        answering = self.cycle is not None and not self.cycle.response_complete
        if answering and self.cycle.more_body and not self.transport.is_closing():
            self._request_timer = self.loop.call_later(_BODY_GRACE_SECONDS, self.evict)
        elif self.conn.our_state is h11.IDLE and self.conn.trailing_data[0]:
            message = f"the request did not arrive within {self._deadlines.request:g} s"
            self._refuse(408, message)
        else:
            self.evict()

    def _refuse(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        headers: list[tuple[str, str]] | None = None,
    ) -> None:
        """An answer that does not come from the app, and the end of the connection."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.evict()
            return
        if self.cycle is not None:  # what the app says from now on has nowhere to go
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        body = json.dumps(error_body(message, kind)).encode()
        said = [
            ("content-type", "application/json"),
            ("content-length", str(len(body))),
            ("connection", "close"),
            *(headers or []),
        ]
        response = h11.Response(status_code=status, headers=said, reason=STATUS_PHRASES[status])
        for event in (response, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


def server_options(
    deadlines: Deadlines | None = None, connections: Connections | None = None
) -> dict[str, Any]:
    """What `uvicorn.Config` is to be given besides the app and where it listens."""
    protocol: Callable[..., asyncio.Protocol] = functools.partial(
        GuardedProtocol,
        deadlines=deadlines or Deadlines(),
        open_now=connections or Connections(),
    )
    return {
        "http": protocol,
        "ws": "none",
        "server_header": False,
        "h11_max_incomplete_event_size": _MAX_INCOMPLETE,
        "limit_concurrency": None,
        "timeout_keep_alive": 5,  # seconds
    }


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
