"""A client of a server such as this one, for the terminal: its status, its sizes, its answers.

The API key comes from the environment, never from a command line, where every user of the machine
could read it; and it is no other service's key, as it goes to whatever address the user names.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from star_elastic.folder import one_line

try:
    import httpx2
except ImportError:
    raise ValueError("talking to a server: pip install 'star-elastic[serve]'") from None

KEY_VARIABLE = "STAR_ELASTIC_API_KEY"
_TIMEOUT_S = 10.0  # to connect, and of replies that nobody has to compute
_MAX_EVENT = 16 * 2**20  # bytes of one event of a stream
_CONTROLS = (*range(0x20), *range(0x7F, 0xA0))
_STEERING = {code: "\ufffd" for code in _CONTROLS if chr(code) not in "\n\t"} | {ord("\r"): ""}


class ServerError(ValueError):
    """The server refused, or failed, or is none: one line. `status` is HTTP's, None without one."""

    def __init__(self, why: str, status: int | None = None) -> None:
        super().__init__(why)
        self.status = status


class Unreachable(ServerError):
    """Nobody answered; it may be worth trying again."""


@dataclass(frozen=True)
class Served:
    """The model that a server offers, its context in tokens, and its sizes: name -> model id."""

    model: str
    sizes: Mapping[str, str]
    context_tokens: int | None = None


class Client:
    """One server; `close` it in the end."""

    def __init__(self, url: str, key: str | None = None) -> None:
        """
        Args:
            url: `http://host:port`; an ending `/v1` makes no difference.
            key: the environment's `STAR_ELASTIC_API_KEY` if None.

        Raises:
            ServerError: no such URL.
        """
        self.root = url.rstrip("/").removesuffix("/v1")
        key = os.environ.get(KEY_VARIABLE) if key is None else key
        headers = {"authorization": f"Bearer {key}"} if key else {}
        try:
            address = httpx2.URL(self.root)
            self._http = httpx2.Client(base_url=address, headers=headers, timeout=_TIMEOUT_S)
        except (httpx2.InvalidURL, UnicodeEncodeError):
            address = None
        if address is None or address.scheme not in ("http", "https") or not address.host:
            raise ServerError(f"{self.root}: no address such as http://127.0.0.1:8000")

    def close(self) -> None:
        """End all connections."""
        self._http.close()

    def status(self) -> dict[str, Any]:
        """What `GET /status` tells.

        Raises:
            ServerError, Unreachable
        """
        status = self._get("/status")
        if not isinstance(status, dict) or "sizes" not in status:
            raise ServerError(f"{self.root}/status: not the status of an elastic server")
        return status

    def served(self) -> Served:
        """The model and its sizes; a server that knows no sizes has none.

        Raises:
            ServerError, Unreachable
        """
        models = self._get("/v1/models")
        try:
            listed = [(each["id"], each.get("size"), each) for each in models["data"]]
            first = listed[0]
        except (TypeError, KeyError, IndexError, AttributeError):
            raise ServerError(f"{self.root}/v1/models: no list of models") from None
        sizes = {printable(size): model for model, size, _ in listed if size is not None}
        return Served(first[0], sizes, first[2].get("max_model_len"))

    def ask(self, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The chunks of a streamed chat completion. Closing the iterator ends it on the server.

        Args:
            body: the request; that it is streamed, with usage, is added.

        Raises:
            ServerError, Unreachable: before the first chunk or after it.
        """
        body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        # an answer may have to wait in the queue, for as long as the user does
        patient = httpx2.Timeout(_TIMEOUT_S, read=None)
        try:
            with self._http.stream(
                "POST", "/v1/chat/completions", json=body, timeout=patient
            ) as response:
                if response.status_code != 200:
                    response.read()
                    raise self._refused(response)
                yield from self._chunks(response.iter_bytes())
        except httpx2.HTTPError as error:
            raise self._unreachable(error) from None

    def _chunks(self, pieces: Iterable[bytes]) -> Iterator[dict[str, Any]]:
        for data in _events(pieces):
            if data == b"[DONE]":
                return
            try:
                chunk = json.loads(data)
            except ValueError:
                chunk = None
            if not isinstance(chunk, dict):
                raise ServerError(f"{self.root}: an event that is no JSON object")
            if "error" in chunk:
                raise ServerError(_message(chunk) or "the answer failed")
            yield chunk
        raise Unreachable(f"{self.root}: the answer broke off")

    def _get(self, path: str) -> Any:
        try:
            response = self._http.get(path)
        except httpx2.HTTPError as error:
            raise self._unreachable(error) from None
        if response.status_code != 200:
            raise self._refused(response)
        try:
            return response.json()
        except ValueError:
            raise ServerError(f"{self.root}{path}: not JSON; is this the right address?") from None

    def _unreachable(self, error: Exception) -> Unreachable:
        return Unreachable(f"{self.root}: {one_line(error)}")

    def _refused(self, response: httpx2.Response) -> ServerError:
        status = response.status_code
        try:
            said = _message(response.json())
        except ValueError:
            said = None
        why = said or f"{self.root} answered with status {status}"
        if status == 401:
            why += f" (the key is read from {KEY_VARIABLE})"
        if wait := response.headers.get("retry-after"):
            why += f"; again in {wait[:20]} s"
        return ServerError(why, status)


def printable(text: str) -> str:
    """Text that a model or a client wrote, without what would steer a terminal."""
    return text.translate(_STEERING)


def _events(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The data of server-sent events.

    Lines end at newlines only: a text may hold what Python's or httpx's idea of lines takes for
    more of them (U+2028).
    """
    held = b""
    for piece in pieces:
        *lines, held = (held + piece).split(b"\n")
        if len(held) > _MAX_EVENT:
            raise ServerError(f"an event of more than {_MAX_EVENT} bytes")
        for line in lines:
            if line.startswith(b"data:"):
                yield line.removeprefix(b"data:").strip()


def _message(body: Any) -> str | None:
    """What an error in OpenAI's shape says."""
    error = body.get("error") if isinstance(body, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    return one_line(ValueError(message)) if isinstance(message, str) and message else None
