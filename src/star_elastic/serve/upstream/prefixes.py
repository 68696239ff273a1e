"""Which replicas have computed how a prompt begins, as far as is remembered here.

A prompt is known by the hashes of its first tokens, at some ends of blocks; the longest one that is
known counts. Unlike a hash ring over the first block, that keeps the turns of one conversation
together where all conversations begin with the same system prompt, and the load of such a prompt
finds its way to several replicas. Unlike a tree it has a fixed size: the oldest entries go.
"""

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

_BLOCK = 32  # tokens
_ENDS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)  # in blocks
_HOMES = 4  # replicas that are remembered for one beginning
Keys = tuple[bytes, ...]


def keys_of(prompt: Sequence[int], salt: str) -> Keys:
    """The beginnings of a prompt, shortest first; none if it is shorter than a block.

    Servers share no prefixes among salts, so neither does this.
    """
    digest = blake2b(salt.encode(), digest_size=8)
    keys, start = [], 0
    for blocks in _ENDS:
        end = blocks * _BLOCK
        if end > len(prompt):
            break
        digest.update(array("q", prompt[start:end]).tobytes())
        keys.append(digest.copy().digest())
        start = end
    return tuple(keys)


class Prefixes:
    """Beginnings -> the replicas that had them last, the latest first."""

    def __init__(self, most: int = 2**15) -> None:
        """Args: most: entries that are kept, some 300 bytes each."""
        self._most = most
        self._homes: OrderedDict[bytes, tuple[object, ...]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._homes)

    def homes(self, keys: Keys) -> tuple[object, ...]:
        """Who had the longest beginning that anyone had."""
        for key in reversed(keys):
            if homes := self._homes.get(key):
                return homes
        return ()

    def note(self, keys: Keys, replica: object) -> None:
        """The replica has these beginnings from now on."""
        for key in keys:
            others = (home for home in self._homes.pop(key, ()) if home is not replica)
            self._homes[key] = (replica, *others)[:_HOMES]
        while len(self._homes) > self._most:
            self._homes.popitem(last=False)

    def forget(self, replica: object) -> None:
        """The replica is gone, and its cache with it."""
        for key, homes in list(self._homes.items()):
            left = tuple(home for home in homes if home is not replica)
            if left:
                self._homes[key] = left
            else:
                del self._homes[key]
