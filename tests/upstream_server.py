"""A little server that speaks OpenAI's API as well or as badly as a test tells it."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

from star_elastic.serve.answers import Asked, Piece
from star_elastic.serve.schema import ChatRequest, CompletionRequest, ThinkingBudget, read
from star_elastic.serve.upstream import Spec, Upstreams, UpstreamSettings

EVENTS = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n\r\n"
DONE = b"data: [DONE]\n\n"
PROMPT = tuple(range(70))
Writer = asyncio.StreamWriter
Reply = Callable[[Writer], Awaitable[None]]


def quick(**changes: Any) -> UpstreamSettings:
    """Probes that come fast; patience that outlasts a busy machine."""
    return UpstreamSettings(**{"probe_every_s": 0.05, "usage_s": 0.5, "failures": 2} | changes)


def sse(data: Any) -> bytes:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


def chat(content: str | None = None, index: int = 0, **more: Any) -> dict[str, Any]:
    """A chunk of a chat; `reasoning`, `reasoning_content` and `role` are the delta's."""
    inner = ("reasoning", "reasoning_content", "role")
    delta = {"content": content} | {name: more.pop(name) for name in inner if name in more}
    choice = {"index": index, "delta": delta, "finish_reason": None}
    return {"object": "chat.completion.chunk", "choices": [choice | more], "usage": None}


def text(text: str = "", index: int = 0, **more: Any) -> dict[str, Any]:
    """A chunk of a completion."""
    return {"choices": [{"index": index, "text": text, "finish_reason": None} | more]}


def usage(completion: int, reasoning: int | None = None, cached: int | None = None) -> Any:
    found: dict[str, Any] = {"prompt_tokens": 70, "completion_tokens": completion}
    if reasoning is not None:
        found["completion_tokens_details"] = {"reasoning_tokens": reasoning}
    if cached is not None:
        found["prompt_tokens_details"] = {"cached_tokens": cached}
    return {"choices": [], "usage": found}


def sends(*chunks: Any, done: bool = True) -> Reply:
    """All these chunks (or bytes), and the end."""
    body = b"".join(each if isinstance(each, bytes) else sse(each) for each in chunks)
    return raw(EVENTS + body + (DONE if done else b""))


def says(*words: str) -> Reply:
    """A chat that says these words, a token each."""
    return sends(
        chat("", role="assistant"),
        *map(chat, words),
        chat(finish_reason="stop"),
        usage(len(words) + 1),
    )


def raw(*parts: bytes, pause_s: float = 0.0, hold: bool = False) -> Reply:
    """These bytes with pauses between them; `hold` keeps the connection open after them."""

    async def reply(writer: Writer) -> None:
        for n, part in enumerate(parts):
            if n and pause_s >= 0:
                await asyncio.sleep(pause_s)
            writer.write(part)
            await writer.drain()
        if hold:
            await asyncio.sleep(60)

    return reply


def status(number: int, message: str = "no", headers: str = "", **error: Any) -> Reply:
    """An error as OpenAI's API has it."""
    body = json.dumps({"error": {"message": message, **error}}).encode()
    head = f"HTTP/1.1 {number} X\r\nContent-Length: {len(body)}\r\n{headers}\r\n".encode()
    return raw(head + body)


class Server:
    """One request a connection. Told by its fields, at any time."""

    def __init__(self, reply: Reply | None = None, port: int = 0) -> None:
        self.reply = reply or says("hi")
        self.port = port
        self.health, self.models = 200, ["the-model"]
        self.max_model_len: int | None = None
        self.metrics: str | None = None
        self.asked: list[dict[str, Any]] = []  # bodies, in order
        self.heads: list[str] = []
        self.probes = 0
        self.left = asyncio.Event()  # a client went away in the middle
        self._tasks: set[asyncio.Task[Any]] = set()

    async def __aenter__(self) -> "Server":
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.stop()

    async def stop(self) -> None:
        """Close the door, and every connection."""
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def spec(self, size: str = "small", tail: str = "", **environ: str) -> Spec:
        return Spec.read(f"{size}={self.url}{tail}", environ)

    async def _serve(self, reader: asyncio.StreamReader, writer: Writer) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._answer(reader, writer)
        except ConnectionError:
            self.left.set()
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: Writer) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        method, path, _ = head.split(" ", 2)
        if method == "GET":
            return await self._tell(path, head, writer)
        length = int(head.lower().split("content-length:")[1].split()[0])
        self.heads.append(head)
        self.asked.append({"path": path} | json.loads(await reader.readexactly(length)))
        replying = asyncio.ensure_future(self.reply(writer))
        leaving = asyncio.ensure_future(reader.read())  # ends when the client goes
        try:
            await asyncio.wait([replying, leaving], return_when=asyncio.FIRST_COMPLETED)
            if not replying.done():
                self.left.set()
            else:
                replying.result()
        finally:
            replying.cancel()
            leaving.cancel()

    async def _tell(self, path: str, head: str, writer: Writer) -> None:
        self.probes += path == "/health"
        code, body = 200, ""
        if path == "/health":
            code = self.health
        elif path == "/v1/models":
            self.heads.append(head)
            listed = [{"id": name, "max_model_len": self.max_model_len} for name in self.models]
            body = json.dumps({"data": listed})
        elif path == "/metrics" and self.metrics is not None:
            body = self.metrics
        else:
            code = 404
        writer.write(f"HTTP/1.1 {code} X\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
        await writer.drain()


def asked(
    chat: bool = True,
    prompt: tuple[int, ...] = PROMPT,
    thinking: int | None = None,
    salt: str = "",
    max_tokens: int = 32,
    **fields: Any,
) -> Asked:
    """A request as the service hands it on; `thinking` is the budget it chose."""
    kind = ChatRequest if chat else CompletionRequest
    said = {"messages": [{"role": "user", "content": "hi"}]} if chat else {"prompt": "hi"}
    request, _ = read(kind, json.dumps({"model": "ours", **said, **fields}).encode())
    return Asked(
        request=request,
        body=said,
        prompts=(prompt,) * (request.answers // request.n),
        max_tokens=max_tokens,
        thinking=None if thinking is None else ThinkingBudget(thinking, "a test"),
        salt=salt,
    )


async def collect(pieces: AsyncIterator[Piece]) -> list[Piece]:
    async with aclosing(pieces) as taken:  # type: ignore[type-var]
        return [piece async for piece in taken]


async def answer(upstreams: Upstreams, wanted: Asked | None = None, size: str = "small") -> str:
    """The content of the first answer."""
    found = await collect(upstreams.answers(wanted or asked(), size))
    return "".join(piece.parts.content for piece in found if piece.index == 0)


async def until(true: Callable[[], bool], seconds: float = 25.0) -> None:
    """Wait for something that should come true."""
    async with asyncio.timeout(seconds):
        while not true():
            await asyncio.sleep(0.01)
