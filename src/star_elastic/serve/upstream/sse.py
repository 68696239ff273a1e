"""Server-sent events out of bytes that may be cut anywhere (WHATWG HTML, section 9.2).

Lines end with LF, CRLF or CR; comments and unknown fields are skipped; an event that the stream's
end cuts off is none. At most a line and an event are held, and both have a greatest length.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from star_elastic.serve.upstream.errors import Garbled

_END = re.compile(rb"\r\n|\n|\r")
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Event:
    """What was dispatched; bytes that are no UTF-8 became U+FFFD."""

    data: str
    name: str = "message"


class SseParser:
    """Cuts a stream into events."""

    def __init__(self, max_line: int = 2**20, max_stream: int = 2**28) -> None:
        """Args: max_line, max_stream: bytes, of a line or an event's data, and of everything."""
        self._max_line, self._max_stream = max_line, max_stream
        self._total = 0
        self._line = bytearray()  # so far, without its end
        self._data: list[bytes] = []
        self._data_bytes = 0
        self._name = b""
        self._after_cr = False  # whose LF may come with the next chunk
        self._first = True

    def feed(self, chunk: bytes) -> Iterator[Event]:
        """The events that this chunk completes; take them all before the next chunk.

        Raises:
            Garbled: a line, an event or the stream is too long. What came before was yielded.
        """
        self._total += len(chunk)
        if self._total > self._max_stream:
            raise Garbled(f"more than {self._max_stream} bytes in one stream")
        start = int(self._after_cr and chunk.startswith(b"\n"))
        if chunk:
            self._after_cr = chunk.endswith(b"\r")
        for end in _END.finditer(chunk, start):
            self._add(chunk[start : end.start()])
            start = end.end()
            line, self._line = bytes(self._line), bytearray()
            if (event := self._read(line)) is not None:
                yield event
        self._add(chunk[start:])

    def _add(self, part: bytes) -> None:
        self._line += part
        if len(self._line) > self._max_line:
            raise Garbled(f"a line of more than {self._max_line} bytes")

    def _read(self, line: bytes) -> Event | None:
        if self._first:
            line, self._first = line.removeprefix(_BOM), False
        if not line:
            return self._dispatch()
        name, _, value = line.partition(b":")  # a comment's name is empty
        value = value.removeprefix(b" ")
        if name == b"data":
            self._data.append(value)
            self._data_bytes += len(value) + 1
            if self._data_bytes > self._max_line + 1:
                raise Garbled(f"an event of more than {self._max_line} bytes")
        elif name == b"event":
            self._name = value
        return None

    def _dispatch(self) -> Event | None:
        data, name = b"\n".join(self._data), self._name
        self._data, self._data_bytes, self._name = [], 0, b""
        if not data:
            return None
        text = data.decode("utf-8", "replace")
        return Event(text, name.decode("utf-8", "replace") or "message")
