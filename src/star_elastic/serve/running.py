"""A server's life: it listens, answers, and on SIGTERM finishes what it has begun.

At the first signal it is not ready any more and refuses what is new (503); what is in flight goes
on, for `drain_s` at most. A second signal ends at once.
"""

import asyncio
import contextlib
import signal
from collections.abc import Generator

import uvicorn

from star_elastic.serve.guard import App, Connections, server_options
from star_elastic.serve.opening import Opened
from star_elastic.serve.service import Service

_LOOK_S = 0.05


class _Server(uvicorn.Server):
    """Leaves signals to us: uvicorn would close the door at once, and end by the signal."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


def configured(app: App, host: str, port: int, connections: int = 1024) -> uvicorn.Config:
    """uvicorn as it is run here; nothing of a request is logged.

    Args:
        connections: open at once, half of them from one address at most.
    """
    room = Connections(connections, max(1, connections // 2))
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        lifespan="off",
        log_level="error",
        access_log=False,
        timeout_graceful_shutdown=1,
        **server_options(connections=room),
    )


async def run(opened: Opened, config: uvicorn.Config, drain_s: float) -> None:
    """Serve until a signal comes; returns when it has ended well."""
    service, server = opened.service, _Server(config)
    told = asyncio.Event()
    loop = asyncio.get_running_loop()

    def hear() -> None:
        if service.draining:
            server.should_exit = server.force_exit = True
        service.draining = True
        told.set()

    for each in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(each, hear)
    draining = asyncio.create_task(_drain(service, server, told, drain_s))
    try:
        async with opened:
            await server.serve()
    finally:
        draining.cancel()
        for each in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(each)


async def _drain(
    service: Service, server: uvicorn.Server, told: asyncio.Event, drain_s: float
) -> None:
    await told.wait()
    deadline = asyncio.get_running_loop().time() + drain_s
    while service.live and asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(_LOOK_S)
    server.should_exit = True
