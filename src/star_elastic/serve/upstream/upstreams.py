"""All servers behind, as one backend: who answers, and who is tried next."""

import asyncio
import logging
import math
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

from star_elastic.serve.answers import AnswerFailed, Asked, Piece
from star_elastic.serve.upstream.call import Call
from star_elastic.serve.upstream.errors import Unusable, UpstreamRefused
from star_elastic.serve.upstream.fleet import Fleet
from star_elastic.serve.upstream.outgoing import BUDGET, says_budget
from star_elastic.serve.upstream.prefixes import Keys, keys_of
from star_elastic.serve.upstream.replica import Replica

_log = logging.getLogger(__name__)
_COME_AGAIN_S = 5  # where no server says
_TICK_S = 0.01  # by which a sleep may end too early


class Upstreams(Fleet):
    """A backend over replicas. What fails before its first piece is tried on another one."""

    def of(self, size: str) -> "OfSize":
        """The backend of one size, `ready` when that one is.

        Raises:
            ValueError: nobody serves it.
        """
        if size not in self._pools:
            raise ValueError(f"size {size!r} has no upstream; {', '.join(self._pools)} have")
        return OfSize(self, size)

    async def answers(
        self, asked: Asked, size: str, confidence: bool = False
    ) -> AsyncGenerator[Piece, None]:
        """As `Backend.answers`. What fails before its first piece is tried elsewhere.

        Raises:
            UpstreamRefused: the request itself, with the status of the server behind.
            AnswerFailed: 502, 503 or 504.
        """
        keys, began = keys_of(asked.prompts[0], asked.salt), self._clock()
        tried: list[Replica] = []
        failed: Unusable | None = None
        for _ in range(self.settings.tries):
            replica = await self._next(size, keys, tried, failed)
            queued_s: float | None = self._clock() - began
            try:
                async with aclosing(self._at_replica(replica, asked, confidence)) as pieces:
                    async for piece in pieces:
                        yield piece if queued_s is None else replace(piece, queued_s=queued_s)
                        queued_s = None
                return
            except Unusable as error:
                failed = error
                tried.append(replica)
        raise _nobody(size, failed, self._pools[size].free_in_s())

    async def _next(
        self, size: str, keys: Keys, tried: list[Replica], failed: Unusable | None
    ) -> Replica:
        """Who is tried now; if all are busy, but not for long, after a wait.

        Raises:
            AnswerFailed: nobody is left.
        """
        pool = self._pools.get(size)
        if pool is None:
            raise AnswerFailed(f"no server behind has the size {size}", 503)
        replica = pool.choose(keys, tried)
        if replica is not None:
            return replica
        wait = pool.free_in_s()
        if wait is not None and wait <= self.settings.patience_s:
            await asyncio.sleep(wait + _TICK_S)
            tried.clear()
            replica = pool.choose(keys)
        if replica is None:
            raise _nobody(size, failed, wait)
        return replica

    async def _at_replica(
        self, replica: Replica, asked: Asked, confidence: bool
    ) -> AsyncGenerator[Piece, None]:
        """The pieces from one replica, which is told how it fares."""
        with replica.serving() as serving:
            try:
                async with aclosing(self._called(replica, asked, confidence)) as pieces:
                    async for piece in pieces:
                        serving.heard(piece.tokens)
                        yield piece
                replica.answered()
            except UpstreamRefused:
                raise  # the client's fault
            except (Unusable, AnswerFailed) as error:
                replica.failed(error)
                _log.warning("%s at %s failed: %s", replica.spec.size, replica.spec.url, error)
                raise

    async def _called(
        self, replica: Replica, asked: Asked, confidence: bool
    ) -> AsyncGenerator[Piece, None]:
        """Again without a budget of thinking, if the server takes none and the client said none."""
        if self._client is None:
            raise AnswerFailed("the servers behind are not watched any more", 503)
        said = says_budget(asked)
        while True:
            budget = said or replica.takes_budget
            try:
                call = Call(self._client, replica, asked, confidence, budget)
                async with aclosing(call.pieces()) as pieces:
                    async for piece in pieces:
                        yield piece
                return
            except UpstreamRefused as error:
                if said or not budget or BUDGET not in f"{error} {error.param}":
                    raise
                replica.takes_budget = False
                _log.warning("%s takes no budget of thinking: %s", replica.spec.url, error)


class OfSize:
    """One size of the upstreams, as a backend of its own."""

    def __init__(self, upstreams: Upstreams, size: str) -> None:
        self._upstreams, self.size = upstreams, size

    @property
    def ready(self) -> bool:
        """Whether this size can answer now."""
        return self._upstreams.ready_at(self.size)

    def answers(
        self, asked: Asked, size: str, confidence: bool = False
    ) -> AsyncGenerator[Piece, None]:
        """As `Backend.answers`."""
        return self._upstreams.answers(asked, size, confidence)


def _nobody(size: str, failed: Unusable | None, wait: float | None = None) -> AnswerFailed:
    """No replica is left; `failed` is what the last one said, `wait` when one is free again."""
    after = _COME_AGAIN_S if wait is None else math.ceil(wait)
    if failed is None:
        state = "up" if wait is None else "free"
        return AnswerFailed(f"no server behind is {state} for the size {size}", 503, after)
    why = f"no server behind could answer at the size {size}: {failed}"
    if failed.busy or failed.unreachable:
        return AnswerFailed(why, 503, after)
    return AnswerFailed(why, 502)
