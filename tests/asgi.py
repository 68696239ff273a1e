"""A real server around an ASGI app, and raw clients of it."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn

from star_elastic.serve.guard import App, Connections, Deadlines, server_options


@dataclass
class Running:
    """A server that listens at `port` of 127.0.0.1, and what it has open."""

    port: int
    connections: Connections
    loop: asyncio.AbstractEventLoop

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def dial(self, source: str = "127.0.0.1") -> socket.socket:
        return socket.create_connection(
            ("127.0.0.1", self.port), timeout=10, source_address=(source, 0)
        )


@contextmanager
def running(
    app: App, deadlines: Deadlines | None = None, connections: Connections | None = None
) -> Iterator[Running]:
    """The app under uvicorn, in a thread."""
    connections = connections or Connections()
    options = server_options(deadlines, connections)
    config = uvicorn.Config(app, port=0, log_config=None, log_level="critical", **options)
    config.timeout_graceful_shutdown = 1
    server, loops = uvicorn.Server(config), []

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        await server.serve()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    deadline = time.monotonic() + 10
    while not server.started:
        assert time.monotonic() < deadline and thread.is_alive()
        time.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield Running(port, connections, loops[0])
    server.should_exit = True
    thread.join(10)
    assert not thread.is_alive()


def everything(connection: socket.socket) -> bytes:
    """What the server sends until it closes."""
    received = b""
    try:
        while piece := connection.recv(65536):
            received += piece
    except ConnectionResetError:
        pass
    return received


def parsed(response: bytes) -> tuple[int, dict[str, Any]]:
    """Status and JSON of one raw answer."""
    head, _, body = response.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)
