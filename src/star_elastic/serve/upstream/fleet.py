"""The replicas of all sizes: they come, are probed, rest, and go while requests are answered."""

import asyncio
import random
import time
from collections.abc import Iterable
from typing import Self

import httpx2

from star_elastic.serve.policy import Load
from star_elastic.serve.upstream.pool import Pool, load_of
from star_elastic.serve.upstream.replica import Clock, Replica, ReplicaState
from star_elastic.serve.upstream.settings import UpstreamSettings
from star_elastic.serve.upstream.spec import Spec
from star_elastic.serve.upstream.watch import Watch


class Fleet:
    """Use it with `async with`, in one asyncio loop.

    Replicas are named by their URLs; one server may hold several sizes, and then goes and comes
    with all of them.
    """

    def __init__(
        self,
        specs: Iterable[Spec],
        settings: UpstreamSettings | None = None,
        clock: Clock = time.monotonic,
        jitter: random.Random | None = None,
    ) -> None:
        """Raises: ValueError: no spec, or one that comes twice."""
        self.settings = settings or UpstreamSettings()
        self._clock, self._jitter = clock, jitter or random.Random()
        self._pools: dict[str, Pool] = {}
        self._watches: dict[Replica, asyncio.Task[None]] = {}
        self._client: httpx2.AsyncClient | None = None
        for spec in specs:
            self._put(spec)
        if not self._pools:
            raise ValueError("upstreams: none")

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def start(self) -> None:
        """Probe every replica once, then go on in the background. Who is down does no harm."""
        if self._client is None:
            self._client = _client(self.settings)
            await asyncio.gather(*(self._watch(each) for each in self._replicas()))

    async def close(self) -> None:
        """End the probes and all connections."""
        tasks = list(self._watches.values())
        self._watches.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    @property
    def sizes(self) -> tuple[str, ...]:
        """In the order in which they were named."""
        return tuple(self._pools)

    @property
    def ready(self) -> bool:
        """Whether every size can answer now."""
        return all(pool.ready for pool in self._pools.values())

    def ready_at(self, size: str) -> bool:
        """Whether this size can answer now."""
        return size in self._pools and self._pools[size].ready

    def load(self, size: str | None = None) -> Load:
        """What the replicas of a size do now, or all of them."""
        return load_of([each for each in self._replicas() if size in (None, each.spec.size)])

    def context_tokens(self, size: str | None = None) -> int | None:
        """What every replica holds (of a size, or all), None if none of them tells."""
        told = [
            each.context_tokens
            for each in self._replicas()
            if size in (None, each.spec.size) and each.context_tokens is not None
        ]
        return min(told, default=None)

    def states(self) -> list[ReplicaState]:
        """Every replica, for operators."""
        return [replica.state for replica in self._replicas()]

    def drain(self, url: str) -> None:
        """Send no new requests there; those in flight finish.

        Raises:
            ValueError: no such replica.
        """
        for replica in self._at(url):
            replica.draining = True

    def restore(self, url: str) -> None:
        """Send requests there again.

        Raises:
            ValueError: no such replica.
        """
        for replica in self._at(url):
            replica.draining = False

    def in_flight(self, url: str) -> int:
        """Requests there that have not ended.

        Raises:
            ValueError: no such replica.
        """
        return sum(replica.in_flight for replica in self._at(url))

    async def add(self, spec: Spec) -> None:
        """Take a replica in; its size may be new. It serves once a probe finds it well.

        Raises:
            ValueError: it is there.
        """
        replica = self._put(spec)
        if self._client is not None:
            await self._watch(replica)

    def remove(self, url: str) -> None:
        """Forget a replica; what is in flight there finishes. Its size stays, perhaps unserved.

        Raises:
            ValueError: no such replica.
        """
        for replica in self._at(url):
            self._pools[replica.spec.size].remove(replica)
            if (task := self._watches.pop(replica, None)) is not None:
                task.cancel()

    def _put(self, spec: Spec) -> Replica:
        if any(
            (each.spec.size, each.spec.url) == (spec.size, spec.url) for each in self._replicas()
        ):
            raise ValueError(f"upstream {spec.size}={spec.url}: it comes twice")
        replica = Replica(spec, self.settings, self._clock)
        pool = self._pools.setdefault(spec.size, Pool(spec.size, self.settings.overload))
        pool.replicas.append(replica)
        return replica

    async def _watch(self, replica: Replica) -> None:
        assert self._client is not None, "not started"
        watch = Watch(self._client, replica, self._jitter)
        await watch.probe()
        if self._client is None or replica not in self._replicas():
            return  # gone meanwhile
        self._watches[replica] = asyncio.create_task(watch.run())

    def _replicas(self) -> list[Replica]:
        return [replica for pool in self._pools.values() for replica in pool.replicas]

    def _at(self, url: str) -> list[Replica]:
        url = url.rstrip("/").removesuffix("/v1")
        found = [replica for replica in self._replicas() if replica.spec.url == url]
        if not found:
            raise ValueError(f"no upstream at {url[:200]!r}")
        return found


def _client(settings: UpstreamSettings) -> httpx2.AsyncClient:
    """One connection a request, see `call`; proxies and keys of the environment are not used."""
    return httpx2.AsyncClient(
        timeout=httpx2.Timeout(None, connect=settings.connect_s, write=settings.between_bytes_s),
        limits=httpx2.Limits(max_connections=None, max_keepalive_connections=0),
        headers={"Accept-Encoding": "identity", "User-Agent": "star-elastic"},
        trust_env=False,
    )
