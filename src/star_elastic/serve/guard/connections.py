"""How many connections may be open, in all and from one address.

One that waits, for the first byte or the last of a request, costs whoever opened it nothing. So
where there is no room, the one that has waited longest makes room for the next: a client that
connects and asks is served, however many others only connect.
"""

import resource
from collections import Counter
from typing import Protocol


class Connection(Protocol):
    """What may be told to end at once."""

    def evict(self) -> None: ...


class Connections:
    """Those that are open, and which of them wait."""

    def __init__(self, most: int = 1024, per_address: int | None = 256) -> None:
        """
        Args:
            most: in all.
            per_address: of a client's address; None behind a proxy, where all have the same.

        Raises:
            ValueError: a limit that is not positive.
        """
        if min(most, per_address or 1) < 1 or per_address == 0:
            raise ValueError(f"connections: limits {most}, {per_address} are not positive")
        self.most, self.per_address = most, per_address
        self._addresses: dict[Connection, str] = {}
        self._counts: Counter[str] = Counter()
        self._waiting: dict[Connection, None] = {}  # the longest first

    @property
    def count(self) -> int:
        """Open now."""
        return len(self._addresses)

    def enter(self, connection: Connection, address: str) -> bool:
        """Note a new one, which waits; False if there is no room and none that could make it."""
        if self.per_address and self._counts[address] >= self.per_address:
            same = (each for each in self._waiting if self._addresses[each] == address)
            if not self._evict(next(same, None)):
                return False
        if self.count >= self.most and not self._evict(next(iter(self._waiting), None)):
            return False
        self._addresses[connection] = address
        self._counts[address] += 1
        self._waiting[connection] = None
        return True

    def leave(self, connection: Connection) -> None:
        """Forget one that is closed; also if it was never noted."""
        self._waiting.pop(connection, None)
        address = self._addresses.pop(connection, None)
        if address is not None:
            self._counts[address] -= 1
            if not self._counts[address]:
                del self._counts[address]

    def waits(self, connection: Connection) -> None:
        """It waits from now on for a request to be complete."""
        if connection in self._addresses:
            self._waiting.pop(connection, None)
            self._waiting[connection] = None

    def works(self, connection: Connection) -> None:
        """Its request is complete, and being answered."""
        self._waiting.pop(connection, None)

    def _evict(self, connection: Connection | None) -> bool:
        if connection is None:
            return False
        self.leave(connection)
        connection.evict()
        return True


def allow_files(wanted: int) -> int:
    """Raise this process's limit of open files as far as it may be; returns what it is then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        return most
    return soft
