"""Answers through real sockets, from servers that behave and servers that do not."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest
from upstream_server import (
    DONE,
    EVENTS,
    Reply,
    Server,
    Writer,
    answer,
    asked,
    chat,
    collect,
    quick,
    raw,
    says,
    sends,
    sse,
    status,
    text,
    until,
    usage,
)

from star_elastic.serve.answers import AnswerFailed, Piece
from star_elastic.serve.upstream import UpstreamRefused, Upstreams


def with_servers(
    *replies: Reply | None, **settings: Any
) -> Callable[[Callable[..., Awaitable[None]]], Callable[[], None]]:
    """Runs a test with an upstream of one size, and a server for each reply."""

    def decorate(test: Callable[..., Awaitable[None]]) -> Callable[[], None]:
        async def main() -> None:
            servers = [Server(reply) for reply in replies]
            for server in servers:
                await server.__aenter__()
            try:
                specs = [server.spec() for server in servers]
                async with asyncio.timeout(30), Upstreams(specs, quick(**settings)) as upstreams:
                    await test(upstreams, *servers)
            finally:
                for server in servers:
                    await server.stop()

        def run() -> None:
            asyncio.run(main())

        run.__name__ = test.__name__
        return run

    return decorate


async def failure(
    upstreams: Upstreams, pieces: list[Piece] | None = None, **fields: Any
) -> AnswerFailed:
    """What a request fails with; the pieces before it."""
    with pytest.raises(AnswerFailed) as caught:
        async for piece in upstreams.answers(asked(**fields), "small"):
            if pieces is not None:
                pieces.append(piece)
    return caught.value


@with_servers(says("Hel", "lo, ", "wörld 😀"))
async def test_a_chat(upstreams: Upstreams, server: Server) -> None:
    assert upstreams.ready
    found = await collect(upstreams.answers(asked(thinking=5), "small", confidence=True))
    assert "".join(piece.parts.content for piece in found) == "Hello, wörld 😀"
    assert (found[-1].finish, sum(piece.tokens for piece in found)) == ("stop", 4)
    sent = server.asked[0]
    assert sent["path"] == "/v1/chat/completions"
    assert (sent["model"], sent["logprobs"], sent["thinking_token_budget"]) == (
        "the-model",
        True,
        5,
    )
    assert upstreams.in_flight(server.url) == 0


@with_servers(sends(text("a"), text("b", finish_reason="length"), usage(2, cached=64)))
async def test_a_completion(upstreams: Upstreams, server: Server) -> None:
    found = await collect(upstreams.answers(asked(chat=False), "small"))
    assert [piece.parts.content for piece in found] == ["a", "b", ""]
    assert (found[-1].finish, found[-1].cached_tokens) == ("length", 64)
    assert server.asked[0]["path"] == "/v1/completions"


STREAM = (
    EVENTS
    + b": hello\r\n\r\n"
    + sse(chat("é東😀")).replace(b"\n", b"\r\n")
    + sse(chat(finish_reason="stop"))
    + DONE
)


@with_servers(raw(*(STREAM[n : n + 1] for n in range(len(STREAM)))))
async def test_bytes_that_come_one_by_one(upstreams: Upstreams, server: Server) -> None:
    assert await answer(upstreams) == "é東😀"


@with_servers(says("one"), says("two"))
async def test_nobody_listens_at_one(upstreams: Upstreams, one: Server, two: Server) -> None:
    await one.stop()
    for _ in range(3):
        assert await answer(upstreams) == "two"
    assert [state.state for state in upstreams.states()] == ["down", "up"]
    assert upstreams.ready  # of its size, one is enough
    await two.stop()
    error = await failure(upstreams)
    assert (error.status, error.retry_after_s) == (503, 5)
    assert not upstreams.ready
    async with Server(says("back"), one.port):
        await until(lambda: upstreams.ready)
        assert await answer(upstreams) == "back"


UNWELL = {
    "500": status(500),
    "503": status(503),
    "429": status(429, headers="Retry-After: 30\r\n"),
    "401": status(401, "wrong key"),
    "404": status(404, "no such model"),
    "redirect": status(302, headers="Location: http://elsewhere.invalid/\r\n"),
    "dies at once": raw(b""),
    "dies in the head": raw(b"HTTP/1.1 200 OK\r\nContent-"),
    "dies before the first chunk": raw(EVENTS),
    "dies after the role": sends(chat("", role="assistant"), done=False),
    "ends without an answer": sends(),
    "speaks no HTTP": raw(b"\x16\x03\x01 hello\r\n\r\n"),
    "a page": raw(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n<html>"),
    "no JSON": raw(EVENTS + b"data: oops\n\n"),
    "no object": sends([1]),
    "an error": sends({"error": {"message": "engine died", "code": 500}}),
    "an error event": raw(EVENTS + b'event: error\ndata: {"message": "engine died"}\n\n'),
    "gives up": sends(chat(finish_reason="abort")),
    "an endless line": raw(EVENTS + b"data: " + b"x" * 2000),
}


@pytest.mark.parametrize("name", UNWELL)
def test_another_one_answers(name: str) -> None:
    """What fails before the first piece is asked elsewhere, and nobody notices."""

    @with_servers(UNWELL[name], says("fine"), max_line=1000)
    async def run(upstreams: Upstreams, bad: Server, good: Server) -> None:
        assert await answer(upstreams) == "fine"
        assert [len(bad.asked), len(good.asked)] == [1, 1]
        upstreams.drain(good.url)
        error = await failure(upstreams)
        assert error.status == (503 if name in ("503", "429") else 502)
        assert not isinstance(error, UpstreamRefused)
        assert bad.url not in str(error)

    run()


LATER = {
    "dies": sends(chat("half"), done=False),
    "no JSON": sends(chat("half"), b"data: oops\n\n"),
    "another answer": sends(chat("half"), chat("x", index=5)),
    "an error": sends(chat("half"), {"error": {"message": "boom", "code": 400}}),
    "gives up": sends(chat("half"), chat(finish_reason="abort")),
    "done too early": sends(chat("half")),
    "an endless line": raw(EVENTS + sse(chat("half")) + b"x" * 2000),
}


@pytest.mark.parametrize("name", LATER)
def test_what_began_is_not_begun_again(name: str) -> None:
    @with_servers(LATER[name], LATER[name], max_line=1000)
    async def run(upstreams: Upstreams, one: Server, two: Server) -> None:
        pieces: list[Piece] = []
        error = await failure(upstreams, pieces)
        assert [piece.parts.content for piece in pieces] == ["half"]
        assert error.status == 502
        assert len(one.asked) + len(two.asked) == 1
        assert upstreams.load().running == 0

    run()


@with_servers(status(503), status(500), status(500), status(500))
async def test_tries_are_counted(upstreams: Upstreams, *servers: Server) -> None:
    assert (await failure(upstreams)).status == 502
    assert sum(len(server.asked) for server in servers) == 3


@with_servers(status(429, headers="Retry-After: 0\r\n"))
async def test_a_short_wait_is_waited(upstreams: Upstreams, server: Server) -> None:
    request = asyncio.create_task(answer(upstreams))
    await until(lambda: len(server.asked) == 1)
    server.reply = says("now")
    assert await request == "now"


@with_servers(status(429, headers="Retry-After: 20\r\n"))
async def test_a_long_wait_is_told(upstreams: Upstreams, server: Server) -> None:
    for _ in range(2):
        error = await failure(upstreams)
        assert (error.status, error.retry_after_s) == (503, 20)
    assert len(server.asked) == 1  # it said when


@with_servers(status(503, headers="Retry-After: Wed, 21 Oct 2015 07:28:00 GMT\r\n"), tries=1)
async def test_a_date_in_the_past_is_now(upstreams: Upstreams, server: Server) -> None:
    assert (await failure(upstreams)).retry_after_s == 1


@with_servers(status(400, "temperature: too hot", param="temperature", code=400), says("no"))
async def test_a_refusal_is_passed_on(upstreams: Upstreams, one: Server, two: Server) -> None:
    error = await failure(upstreams)
    assert isinstance(error, UpstreamRefused)
    assert (error.status, str(error)) == (400, "temperature: too hot")
    assert error.body()["error"] == {
        "message": "temperature: too hot",
        "type": "invalid_request_error",
        "param": "temperature",
        "code": "upstream_refused",
    }
    assert len(two.asked) == 0


@with_servers(sends({"error": {"message": "too long", "code": 400}}))
async def test_a_refusal_in_the_stream(upstreams: Upstreams, server: Server) -> None:
    error = await failure(upstreams)
    assert isinstance(error, UpstreamRefused)
    assert (error.status, str(error)) == (400, "too long")


@with_servers(status(400, "thinking_token_budget is set but reasoning_config is not"))
async def test_a_budget_nobody_asked_for_is_dropped(upstreams: Upstreams, server: Server) -> None:
    async def reply(writer: Writer) -> None:
        knows = "thinking_token_budget" not in server.asked[-1]
        await (says("ok") if knows else refusal)(writer)

    refusal, server.reply = server.reply, reply
    assert await answer(upstreams, asked(thinking=9)) == "ok"
    assert await answer(upstreams, asked(thinking=9)) == "ok"
    assert len(server.asked) == 3  # it is remembered
    error = await failure(upstreams, thinking=9, thinking_token_budget=9)
    assert isinstance(error, UpstreamRefused)


@with_servers(raw(b"", EVENTS, pause_s=20), says("no"), first_byte_s=0.3)
async def test_no_first_byte(upstreams: Upstreams, slow: Server, other: Server) -> None:
    error = await failure(upstreams)
    assert error.status == 504
    assert "silent for 0.3 seconds" in str(error)
    await until(slow.left.is_set)
    assert len(other.asked) == 0  # it had its time


@with_servers(raw(EVENTS, b": x\n\n", pause_s=20), first_byte_s=0.3)
async def test_a_head_is_no_first_byte(upstreams: Upstreams, server: Server) -> None:
    assert (await failure(upstreams)).status == 504


@with_servers(raw(EVENTS + sse(chat("a")), b"", pause_s=20), between_bytes_s=0.3)
async def test_silence_in_the_middle(upstreams: Upstreams, server: Server) -> None:
    pieces: list[Piece] = []
    assert (await failure(upstreams, pieces)).status == 504
    assert len(pieces) == 1


@with_servers(raw(EVENTS, *([b": patience\n\n"] * 8), sse(chat("a", finish_reason="stop")) + DONE))
async def test_comments_are_signs_of_life(upstreams: Upstreams, server: Server) -> None:
    assert await answer(upstreams) == "a"


NEVER_ENDING = {
    "told all": says("all"),
    "no mark": sends(chat("all"), chat(finish_reason="stop"), usage(1), done=False),
    "no count": sends(chat("all", finish_reason="stop"), done=False),
    "garbage": sends(chat("all", finish_reason="stop"), b"data: oops\n\n", done=False),
    "comments": raw(
        EVENTS + sse(chat("all", finish_reason="stop")), *[b": x\n\n"] * 200, pause_s=0.1
    ),
}


@pytest.mark.parametrize("name", NEVER_ENDING)
def test_a_connection_that_is_never_closed(name: str) -> None:
    async def reply(writer: Writer) -> None:
        await NEVER_ENDING[name](writer)
        await asyncio.sleep(60)

    @with_servers(reply, between_bytes_s=20, usage_s=0.3)
    async def run(upstreams: Upstreams, server: Server) -> None:
        async with asyncio.timeout(15):
            assert await answer(upstreams) == "all"
            await server.left.wait()

    run()


def endless(written: list[int]) -> Reply:
    """Writes as much as it can; notes the bytes."""

    async def reply(writer: Writer) -> None:
        writer.write(EVENTS)
        chunk = sse(chat("x" * 1000))
        while True:
            writer.write(chunk)
            await writer.drain()
            written.append(len(chunk))

    return reply


def test_a_slow_caller_holds_the_server_up() -> None:
    written: list[int] = []

    @with_servers(endless(written))
    async def run(upstreams: Upstreams, server: Server) -> None:
        pieces = upstreams.answers(asked(), "small")
        await anext(pieces)
        seen = -1
        while seen != sum(written):  # until the sockets are full
            seen = sum(written)
            await asyncio.sleep(0.3)
        assert seen < 2**24
        for _ in range(20_000):  # what is taken makes room
            await anext(pieces)
        assert sum(written) > seen
        await pieces.aclose()
        async with asyncio.timeout(25):
            await server.left.wait()
        assert upstreams.in_flight(server.url) == 0

    run()


@with_servers(endless([]), endless([]), raw(EVENTS, hold=True))
async def test_who_goes_is_noticed(
    upstreams: Upstreams, one: Server, two: Server, three: Server
) -> None:
    """By closing the iterator; by cancelling the task; by an anyio scope, before any piece."""
    pieces = upstreams.answers(asked(prompt=(1,)), "small")
    await anext(pieces)
    assert upstreams.in_flight(one.url) == 1
    await pieces.aclose()
    task = asyncio.create_task(collect(upstreams.answers(asked(prompt=(1,)), "small")))
    await until(lambda: len(two.asked) == 1)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    async with asyncio.timeout(25):
        await asyncio.gather(one.left.wait(), two.left.wait())
    async with anyio.create_task_group() as group:  # as Starlette does, and it cancels for good
        group.start_soon(collect, upstreams.answers(asked(prompt=(1,)), "small"))
        await until(lambda: len(three.asked) == 1)
        group.cancel_scope.cancel()
    async with asyncio.timeout(25):
        await three.left.wait()
    assert [state.in_flight for state in upstreams.states()] == [0, 0, 0]
    assert upstreams.load().running == upstreams.load().queued == 0


def test_keys_come_from_the_environment_and_stay_hidden(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with Server(status(401, "bad key")) as server:
            spec = server.spec(tail="?key_env=OURS#mine", OURS="s3cret")
            async with Upstreams([spec], quick()) as upstreams:
                await failure(upstreams)
            assert "s3cret" not in f"{spec} {upstreams.states()}"
            assert server.asked[0]["model"] == "mine"
            assert len(server.heads) == 2  # its models, and the request
            assert all("authorization: bearer s3cret" in head.lower() for head in server.heads)

    with caplog.at_level(logging.DEBUG, "star_elastic"):
        asyncio.run(main())
    assert "bad key" in caplog.text and "s3cret" not in caplog.text


@with_servers(says("a"))
async def test_a_size_nobody_has(upstreams: Upstreams, server: Server) -> None:
    with pytest.raises(AnswerFailed, match="no server behind has the size large") as caught:
        await collect(upstreams.answers(asked(), "large"))
    assert caught.value.status == 503
    with pytest.raises(ValueError, match="'large' has no upstream; small have"):
        upstreams.of("large")
    assert upstreams.of("small").ready
