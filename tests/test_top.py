"""`star-elastic top` before a real server, in pipes and in a terminal."""

import fcntl
import io
import json
import os
import pty
import signal
import socket
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from rich.console import Console
from serving import NAME, Server, model, served
from waiting import until

from star_elastic.cli.top import frame

COMMAND = [sys.executable, "-m", "star_elastic", "top"]
STATUS = {
    "model": "m\x1b[31m",
    "seconds_up": 93784.0,
    "draining": True,
    "ready": False,
    "load": {
        "queued": 3,
        "running": 2,
        "tokens_per_second": 1234.5,
        "cache_used": 0.666,
        "device_used": 0.71,
    },
    "memory": {"weights": 3 * 2**30, "copies": 0, "cache": 2**20, "process": None},
    "sizes": [
        {
            "name": "12b",
            "active_params": 2_040_000_000,
            "price": 2.04,
            "ready": False,
            "requests": 1,
            "tokens": 1234567,
            "time_per_token_ms": 12.345,
        }
    ],
    "requests": [
        {
            "id": "0123456789abcdef",
            "size": "30b",
            "sizes": ["12b", "30b"],
            "key": None,
            "phase": "answering",
            "prompt_tokens": 4096,
            "tokens": 17,
            "max_tokens": 1000,
            "seconds": 1.26,
            "why": ["cascade: 12b answers first", "[red]cascade\x07"],
        }
    ],
}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with served(model()) as running:
        running.chat(max_tokens=4)
        yield running


def top(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *words],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "COLUMNS": "140", **environment},
    )


def test_a_frame_tells_all_and_steers_nothing() -> None:
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(frame(STATUS))
    text = console.export_text()
    for said in (
        "draining",
        "up 1 d 2 h",
        "2 running",
        "3 queued",
        "1,234 tokens/s",
        "cache 67% used",
        "device 71% used",
        "weights 3.0 GiB",
        "2.04B",
        "1,234,567",
        "12.35",
        "12b → 30b",
        "17/1,000",
        "[red]cascade",
    ):
        assert said in text, said
    assert "\x1b" not in text and "\x07" not in text and "copies" not in text


def test_once_prints_a_frame(server: Server) -> None:
    done = top(server.url, "--once")
    assert done.returncode == 0, done.stderr
    for said in (NAME, "0 running", "full", "small", "prefix", "no requests now"):
        assert said in done.stdout
    assert top(f"{server.url}/v1").stdout.startswith(NAME)  # no terminal: once


def test_json_is_the_servers_own(server: Server) -> None:
    status = json.loads(top(server.url, "--json").stdout)
    assert status.keys() == server.client.get("/status").json().keys()
    assert [size["name"] for size in status["sizes"]] == ["full", "prefix", "small"]


def test_a_server_that_is_not_there_is_one_line() -> None:
    done = top(f"http://127.0.0.1:{free_port()}", "--once")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: http://127.0.0.1:") and done.stderr.count("\n") == 1
    assert top("nonsense", "--once").returncode == 1


def test_live_until_interrupted(server: Server) -> None:
    with terminal(server.url) as (process, seen):
        until(lambda: "tokens/s" in seen() and "prefix" in seen())
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
    assert "Traceback" not in seen()


def test_a_server_that_is_gone_is_waited_for() -> None:
    running = served(model())
    url = running.__enter__().url
    with terminal(url) as (process, seen):
        until(lambda: "tokens/s" in seen())
        running.__exit__(None, None, None)
        until(lambda: "trying again" in seen())
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def terminal(url: str) -> Iterator[tuple[subprocess.Popen[bytes], "Seen"]]:
    """`top` in a terminal of its own, and what it has written there so far."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 140, 0, 0))
    environment = {**os.environ, "TERM": "xterm"}
    process = subprocess.Popen(
        [*COMMAND, url], stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    os.set_blocking(ours, False)
    try:
        yield process, Seen(ours)
    finally:
        process.kill()
        process.wait()
        os.close(ours)


class Seen:
    """All that a terminal was sent."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._sent = descriptor, b""

    def __call__(self) -> str:
        try:
            while piece := os.read(self._descriptor, 65536):
                self._sent += piece
        except OSError:  # nothing more now, or the other side is closed
            pass
        return self._sent.decode("utf-8", "replace")
