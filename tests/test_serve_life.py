"""Clients that go away, requests that fail, signals: what was held is free, the others go on."""

import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from command import Command
from serving import NAME, Server, model, served
from waiting import until

from star_elastic.serve.opening import Capacity

LONG = {"max_tokens": 190, "logit_bias": {"2": -100}}  # never the end
FULL = f"{NAME}:full"  # under load a policy would choose another
MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with served(model("nemotron_h"), Capacity(slots=1, max_length=250, step_tokens=8)) as running:
        yield running


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("after_s", [0.02, 0.15])
def test_who_goes_away_frees_the_slot(server: Server, stream: bool, after_s: float) -> None:
    slow = SlowSteps(server, 0.02)
    try:
        body = {"model": FULL, "messages": [{"role": "user", "content": "a " * 20}]}
        body |= {"stream": stream, **LONG}
        raw = request_bytes(server, body)
        with socket.create_connection(address(server)) as connection:
            connection.sendall(raw)
            until(lambda: server.opened.service.live)
            time.sleep(after_s)
        assert server.wait_idle() <= 50  # a second
    finally:
        slow.end()
    assert server.chat().status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_who_goes_away_while_waiting_is_forgotten(server: Server, stream: bool) -> None:
    slow = SlowSteps(server, 0.02)
    body = {"model": FULL, "messages": MESSAGES, **LONG}
    try:
        with socket.create_connection(address(server)) as first:
            first.sendall(request_bytes(server, {**body, "stream": True}))
            until(lambda: server.opened.worker.engine.stats.running == 1)
            with socket.create_connection(address(server)) as second:
                second.sendall(request_bytes(server, {**body, "stream": stream}))
                until(lambda: server.opened.worker.engine.stats.queued == 1)
            before = server.tokens()
            until(lambda: server.opened.worker.engine.stats.queued == 0)
            assert server.tokens() - before <= 50  # a second
            assert server.opened.worker.engine.stats.running == 1
        assert server.wait_idle() <= 50
    finally:
        slow.end()


def test_five_hundred_that_go_away_leak_nothing(server: Server) -> None:
    def ask(n: int) -> None:
        body = {"model": FULL, "messages": MESSAGES, "stream": n % 2 == 0, **LONG}
        with socket.create_connection(address(server)) as connection:
            connection.sendall(request_bytes(server, body))
            time.sleep((n % 7) / 500)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(ask, range(500)))
    assert server.wait_idle() <= 16 * 50
    stats = server.opened.worker.engine.stats
    assert (stats.queued, stats.running, stats.cache_used) == (0, 0, 0.0)
    assert server.chat().status_code == 200


def test_a_request_that_fails_fails_alone(server: Server) -> None:
    poison = server.opened.model.tokenizer("é", add_special_tokens=False).input_ids[0]
    view: Any = server.opened.model["full"]

    def refuse(_: Any, args: Any, kwargs: Any) -> None:
        if (kwargs["input_ids"] == poison).any():
            raise RuntimeError("out of memory, say")

    hook = view.register_forward_pre_hook(refuse, with_kwargs=True)
    try:
        with ThreadPoolExecutor(8) as pool:
            texts = ["hé" if n % 4 == 0 else "hi" for n in range(16)]
            replies = list(pool.map(lambda text: server.chat(text, model=FULL), texts))
    finally:
        hook.remove()
    for text, reply in zip(texts, replies, strict=True):
        assert reply.status_code == (500 if "é" in text else 200)
        if "é" in text:
            assert reply.json()["error"]["code"] == "answer_failed"
    assert len({r.json()["choices"][0]["message"]["content"] for r in replies if r.is_success}) == 1


def test_a_step_that_raises_ends_its_requests_only(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = server.opened.worker.engine.scheduler

    def broken() -> None:
        monkeypatch.undo()
        raise KeyError("a fault of ours")

    monkeypatch.setattr(scheduler, "schedule", broken)
    assert server.chat().status_code == 500
    assert server.chat().status_code == 200


def test_a_stream_that_fails_says_so_and_ends(server: Server) -> None:
    view: Any = server.opened.model["full"]
    calls = []

    def refuse(*_: Any) -> None:
        calls.append(1)
        if len(calls) > 6:
            raise RuntimeError("out of memory, say")

    hook = view.register_forward_pre_hook(refuse)
    try:
        body = {"model": FULL, "messages": MESSAGES, **LONG}
        events = server.events("/v1/chat/completions", body)
    finally:
        hook.remove()
    assert events[-1]["error"]["code"] == "answer_failed"
    assert "choices" in events[0]
    server.wait_idle()


def test_sigterm_drains(tmp_path: Path) -> None:
    """Not ready at once, 503 for what is new, what is in flight ends well, exit code 0."""
    model("nemotron_h").save_pretrained(tmp_path / "nano")
    with process(tmp_path / "nano", "--drain-seconds", "60") as (child, url):
        body = {"model": "nano", "messages": MESSAGES, "n": 2, **LONG}
        bodies = [{**body, "stream": stream} for stream in (True, False)]
        with ThreadPoolExecutor(2) as pool:
            asked = [pool.submit(posted, url, body) for body in bodies]
            until(lambda: len(httpx2.get(f"{url}/status").json()["requests"]) == 2)
            child.send_signal(signal.SIGTERM)
            until(lambda: httpx2.get(f"{url}/ready").status_code == 503)
            refused = posted(url, bodies[1])
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) > 0
            for answer in asked:
                assert answer.result().status_code == 200
                assert answer.result().text.count('"finish_reason":"length"') == 2
        assert child.wait(10) == 0


def test_a_second_signal_and_a_drain_time_end_it(tmp_path: Path) -> None:
    model("nemotron_h").save_pretrained(tmp_path / "nano")
    body = {"model": "nano", "messages": MESSAGES, "n": 64, **LONG}
    for drain, signals in (("0.5", 1), ("60", 2)):
        with (
            process(tmp_path / "nano", "--drain-seconds", drain) as (child, url),
            ThreadPoolExecutor(1) as pool,
        ):
            asked = pool.submit(posted, url, body)
            until(lambda url=url: httpx2.get(f"{url}/status").json()["requests"] != [])
            for _ in range(signals):
                child.send_signal(signal.SIGTERM)
                time.sleep(0.2)
            assert child.wait(50) == 0
            answer = asked.result()  # cut short, or an error of the connection
            assert isinstance(answer, httpx2.HTTPError) or answer.status_code != 200


class SlowSteps:
    """Makes a server's steps take a while, so that a phase lasts long enough to be met."""

    def __init__(self, server: Server, seconds: float) -> None:
        view: Any = server.opened.model["full"]
        self._hook = view.register_forward_pre_hook(lambda *_: time.sleep(seconds))

    def end(self) -> None:
        self._hook.remove()


@contextmanager
def process(folder: Path, *options: str) -> Iterator[tuple[Command, str]]:
    """`star-elastic serve` in a process of its own, once it is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    url = f"http://127.0.0.1:{port}"
    words = ["serve", folder, "--port", port, "--max-length", 250, "--slots", 4, *options]
    child = Command(*words)

    def ready() -> bool:
        assert child.returncode is None, "it did not start"
        try:
            return httpx2.get(f"{url}/ready").status_code == 200
        except httpx2.ConnectError:
            return False

    try:
        until(ready, 120)
        yield child, url
    finally:
        child.kill()
        child.wait()


def posted(url: str, body: dict[str, Any]) -> Any:
    try:
        return httpx2.post(f"{url}/v1/chat/completions", json=body, timeout=60)
    except httpx2.HTTPError as error:
        return error


def address(server: Server) -> tuple[str, int]:
    host, _, port = server.url.removeprefix("http://").partition(":")
    return host, int(port)


def request_bytes(server: Server, body: dict[str, Any]) -> bytes:
    request = server.client.build_request("POST", "/v1/chat/completions", json=body)
    lines = [f"{name}: {value}" for name, value in request.headers.items()]
    head = "\r\n".join(["POST /v1/chat/completions HTTP/1.1", *lines, "", ""])
    return head.encode() + request.content
