"""Asks a replica again and again whether it is well, what it serves, and how busy it is."""

import asyncio
import logging
import random
from collections.abc import Mapping
from typing import Any

import httpx2

from star_elastic.serve.upstream.chunks import parsed
from star_elastic.serve.upstream.figures import Figures, read_figures
from star_elastic.serve.upstream.replica import Replica

_log = logging.getLogger(__name__)
_MOST = 2**23  # bytes of a reply that are read
_NOT_THERE = (404, 405, 501)


class Watch:
    """Probes one replica until its task is cancelled."""

    def __init__(self, client: httpx2.AsyncClient, replica: Replica, jitter: random.Random) -> None:
        self._client, self._replica, self._jitter = client, replica, jitter
        self._has_health = self._has_figures = True

    async def run(self) -> None:
        """Probe every `probe_every_s`, give or take a fifth: front ends do not ask in step."""
        while True:
            every = self._replica.settings.probe_every_s
            await asyncio.sleep(every * self._jitter.uniform(0.8, 1.2))
            await self.probe()

    async def probe(self) -> None:
        """Ask once, and tell the replica's state."""
        replica, was = self._replica, self._replica.usable
        try:
            async with asyncio.timeout(replica.settings.probe_timeout_s):
                await self._ask()
        except Exception as error:  # of many kinds, and a watch never ends
            why = str(error) or type(error).__name__
            replica.probed_badly(f"its health is not told: {why[:200]}")
        else:
            replica.probed_well(await self._figures())
        if replica.usable != was:
            level = logging.INFO if replica.usable else logging.WARNING
            verdict = "up" if replica.usable else f"down: {replica.why}"
            _log.log(level, "%s at %s is %s", replica.spec.size, replica.spec.url, verdict)

    async def _ask(self) -> None:
        """Raises: an error of any kind: it is not well."""
        replica = self._replica
        if self._has_health or not replica.identified:
            status, _ = await self._get("/health")
            self._has_health = status not in _NOT_THERE
            if self._has_health and not 200 <= status < 300:
                raise ValueError(f"/health says {status}")
        if not replica.identified or not self._has_health:
            await self._identify()

    async def _identify(self) -> None:
        """Learn the model's id, and how much it holds. One that was given need not be listed."""
        replica = self._replica
        status, body = await self._get("/v1/models")
        if status != 200 and (replica.spec.model is None or not self._has_health):
            raise ValueError(f"/v1/models says {status}")
        listed = _listed(body) if status == 200 else {}
        replica.model = replica.spec.model or next(iter(listed), None)
        if replica.model is None:
            raise ValueError("/v1/models lists none")
        replica.context_tokens = listed.get(replica.model)
        replica.identified = self._has_figures = True

    async def _figures(self) -> Figures | None:
        """Its load. That it tells none, or not in time, is no fault."""
        replica = self._replica
        if not self._has_figures:
            return None
        ours = replica.in_flight
        try:
            async with asyncio.timeout(replica.settings.probe_timeout_s):
                status, body = await self._get("/metrics")
        except Exception:  # of many kinds
            return None
        found = read_figures(body.decode("utf-8", "replace"), ours) if status == 200 else None
        self._has_figures = found is not None
        return found

    async def _get(self, path: str) -> tuple[int, bytes]:
        spec = self._replica.spec
        async with self._client.stream("GET", spec.url + path, headers=spec.headers()) as response:
            return response.status_code, await read_most(response, _MOST)


async def read_most(response: httpx2.Response, most: int) -> bytes:
    """A body, cut after so many bytes."""
    body = bytearray()
    async for chunk in response.aiter_raw():
        body += chunk
        if len(body) >= most:
            break
    return bytes(body[:most])


def _listed(body: bytes) -> dict[str, int | None]:
    """The ids of models, with the tokens that each holds."""
    entries: Any = parsed(body.decode("utf-8", "replace")).get("data")
    if not isinstance(entries, list):
        raise ValueError("/v1/models is no list")
    return {
        entry["id"]: _tokens(entry)
        for entry in entries
        if isinstance(entry, dict) and isinstance(entry.get("id"), str)
    }


def _tokens(entry: Mapping[str, Any]) -> int | None:
    value = entry.get("max_model_len")  # vLLM's
    return value if type(value) is int and value > 0 else None
