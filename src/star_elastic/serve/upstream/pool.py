"""The replicas of one size: which one takes a request, and what they do together."""

import math
from collections.abc import Collection, Sequence

from star_elastic.serve.policy import Load
from star_elastic.serve.upstream.prefixes import Keys, Prefixes
from star_elastic.serve.upstream.replica import Replica


class Pool:
    """Replicas may come and go at any time."""

    def __init__(self, size: str, overload: float) -> None:
        """Args: overload: see `UpstreamSettings`."""
        self.size, self._overload = size, overload
        self.replicas: list[Replica] = []
        self._prefixes = Prefixes()
        self._chosen = 0

    @property
    def ready(self) -> bool:
        """Whether one of them takes requests."""
        return any(replica.usable for replica in self.replicas)

    def choose(self, keys: Keys, tried: Collection[Replica] = ()) -> Replica | None:
        """Who takes a request that begins so; None if nobody is left.

        Of those that had its beginning, the one with the fewest requests, unless it has more than
        its share; else the one with the fewest of all, and of equals the longest unused. A share is
        `overload` times what each had if all had the same (consistent hashing with bounded loads,
        https://arxiv.org/abs/1608.01350).
        """
        able = [each for each in self.replicas if each.usable and each not in tried]
        able = [each for each in able if each.busy_s == 0]
        able = [each for each in able if not each.resting] or able
        if not able:
            return None
        share = math.ceil(self._overload * (sum(each.burden for each in able) + 1) / len(able))
        homes = self._prefixes.homes(keys)
        fit = [each for each in able if each in homes and each.burden < share]
        replica = min(fit or able, key=lambda each: (each.burden, each.chosen))
        self._chosen += 1
        replica.chosen = self._chosen
        self._prefixes.note(keys, replica)
        return replica

    def free_in_s(self) -> float | None:
        """Seconds until the first of those that said how long they are busy; None: none did."""
        busy = [each.busy_s for each in self.replicas if each.usable and each.busy_s > 0]
        return min(busy, default=None)

    def remove(self, replica: Replica) -> None:
        """It takes no more requests; those in flight go on."""
        self.replicas.remove(replica)
        replica.draining = True
        self._prefixes.forget(replica)


def load_of(replicas: Sequence[Replica]) -> Load:
    """What these do together.

    A server that tells how many run and wait is believed; of another one, our requests that have
    had no piece yet are taken to wait.
    """
    queued = running = 0
    for replica in replicas:
        if replica.figures is None:
            queued += replica.silent
            running += replica.in_flight - replica.silent
        else:
            queued += replica.figures.waiting
            running += replica.figures.running
    shares = [each.figures.cache_used for each in replicas if each.figures is not None]
    return Load(
        queued=queued,
        running=running,
        tokens_per_second=sum(replica.pace.per_second for replica in replicas),
        cache_used=sum(shares) / len(shares) if shares else 0.0,
    )
