"""API keys: who may ask, how much in a minute, and who may administer.

The file holds SHA-256 digests, never keys. A key is 256 random bits, which no digest gives away, so
nothing depends on who may read the file, only on who may write it; `star-elastic keys` makes it
0600 nevertheless.
"""

import hashlib
import hmac
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError

from star_elastic.folder import one_line
from star_elastic.serve.policy import Bucket, Clock, Refused
from star_elastic.submodel import Strict

_PREFIX, _BYTES = "se-", 32
_MAX_FILE = 4 * 2**20  # bytes
Amount = Annotated[int, Field(gt=0, le=2**53)]


class KeysError(ValueError):
    """A file of keys that cannot be used: one line naming file, entry, field and value."""


class Key(Strict):
    """One key as the server knows it: by its digest. None: no limit of its own."""

    name: str = Field(pattern=r"^[A-Za-z0-9._@-]{1,64}$")  # goes into logs and metrics
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    tier: str | None = Field(default=None, min_length=1, max_length=64)
    requests_per_minute: Amount | None = None
    tokens_per_minute: Amount | None = None
    budget_per_minute: float | None = Field(default=None, gt=0)  # a cost, see `policy.Size.price`
    admin: bool = False


class Keys:
    """All keys of a server."""

    def __init__(self, entries: Sequence[Key]) -> None:
        """Raises: ValueError: two entries have the same name, or are the same key."""
        for field in ("name", "sha256"):
            values = [getattr(key, field) for key in entries]
            for i, value in enumerate(values):
                if value in values[:i]:
                    raise ValueError(f"entry {i + 1}: {field}: {value} is that of another entry")
        self._entries = tuple(entries)
        self._digests = [bytes.fromhex(key.sha256) for key in entries]

    @classmethod
    def read(cls, path: Path | str) -> "Keys":
        """The keys in a YAML or JSON file.

        Raises:
            KeysError: it has none, or names file, entry, field and value.
            OSError: it cannot be read.
        """
        keys = cls.read_any(path)
        if not len(keys):
            raise KeysError(f"{path}: no keys; `star-elastic keys new NAME --file` makes one")
        return keys

    @classmethod
    def read_any(cls, path: Path | str) -> "Keys":
        """As `read`, but a file may hold no key (after the last was removed)."""
        try:
            return cls([_key(i, entry) for i, entry in enumerate(_entries(Path(path)), 1)])
        except ValueError as error:
            raise KeysError(f"{path}: {one_line(error)}") from None

    def check(self, presented: str | None) -> Key | None:
        """The entry of a key; None if it is nobody's. Takes the same time for any."""
        digest = hashlib.sha256((presented or "").encode("utf-8", "surrogatepass")).digest()
        found = None
        for key, expected in zip(self._entries, self._digests, strict=True):
            if hmac.compare_digest(digest, expected):
                found = key
        return found if presented else None

    def limits(self, clock: Clock) -> dict[str, "Limit"]:
        """By name, for keys that have any; `clock` in seconds."""
        return {
            key.name: Limit(key, clock)
            for key in self._entries
            if key.requests_per_minute or key.tokens_per_minute
        }

    def budgets(self, clock: Clock) -> dict[str, Bucket]:
        """By name, what `policy.ByCost` takes."""
        return {
            key.name: Bucket(key.budget_per_minute, clock)
            for key in self._entries
            if key.budget_per_minute is not None
        }

    def __iter__(self) -> Iterator[Key]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


class Limit:
    """Requests and tokens that a key has left in this minute."""

    def __init__(self, key: Key, clock: Clock) -> None:
        """`clock` in seconds, never going back."""
        self._requests, self._tokens = (
            Bucket(per_minute, clock) if per_minute else None
            for per_minute in (key.requests_per_minute, key.tokens_per_minute)
        )

    def admit(self, tokens: int) -> None:
        """Book one request, of at most so many tokens: its prompt and all its answers.

        Raises:
            Refused: it must wait, and how long; or it asks for more than a minute ever holds.
                Nothing is booked then.
        """
        asked = [(self._requests, 1, "requests"), (self._tokens, tokens, "tokens")]
        for bucket, cost, what in asked:
            if bucket and bucket.left < cost:
                seconds = bucket.seconds_until(cost)
                most = f"{bucket.per_minute:.0f} {what} a minute"
                if seconds is None:
                    raise Refused(f"rate limit: {cost} {what} in one request, this key has {most}")
                raise Refused(f"rate limit: this key has {most}", seconds)
        for bucket, cost, _ in asked:
            if bucket:
                bucket.charge(cost)

    def give_back(self, tokens: int) -> None:
        """Tokens that were booked and not used."""
        if self._tokens:
            self._tokens.charge(-tokens)


def new_key() -> str:
    """A key nobody else has: `se-` and 256 random bits."""
    return _PREFIX + secrets.token_urlsafe(_BYTES)


def digest_of(key: str) -> str:
    """What `Key.sha256` holds of it."""
    return hashlib.sha256(key.encode()).hexdigest()


class _OnceLoader(yaml.SafeLoader):
    """YAML as `safe_load` reads it, but no field of an entry may be there twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [name.value for name, _ in node.value]
        for i, name in enumerate(names):
            if name in names[:i]:
                raise ValueError(f"line {node.start_mark.line + 1}: {name!r} is there twice")
        return super().construct_mapping(node, deep)


def _entries(path: Path) -> list[Any]:
    text = path.read_bytes()[: _MAX_FILE + 1]
    if len(text) > _MAX_FILE:
        raise ValueError(f"more than {_MAX_FILE} bytes")
    try:
        entries = _OnceLoader(text.decode("utf-8")).get_single_data()
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"neither YAML nor JSON: {one_line(error)}") from None
    if entries is None:
        return []
    if not isinstance(entries, list):
        raise ValueError("not a list of entries (`- name: ...`)")
    return entries


def _key(number: int, entry: Any) -> Key:
    try:
        return Key.model_validate(entry)
    except ValidationError as error:
        first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"])
    if field == "sha256":  # never quoted: it may be the key itself, put there by mistake
        raise ValueError(f"entry {number}: sha256: not 64 lower-case hexadecimal digits")
    if first["type"] == "extra_forbidden":
        known = ", ".join(Key.model_fields)
        raise ValueError(f"entry {number}: unknown field {field[:80]!r}; known are {known}")
    shown = "" if first["type"] == "missing" else f" (got {repr(first['input'])[:80]})"
    raise ValueError(f"entry {number}: {field + ': ' if field else ''}{first['msg']}{shown}")
