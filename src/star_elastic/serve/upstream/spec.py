"""Where a size is served: `12b=https://host:8000/v1?key_env=NAME#model-id`."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import SplitResult, parse_qsl, urlsplit

_FORM = "SIZE=http://HOST:PORT[?key_env=VARIABLE][#MODEL]"


@dataclass(frozen=True, slots=True)
class Spec:
    """One replica of one size.

    `url` ends before `/v1`. `model` is its id there, None: the first that the server lists. `key`
    is sent as a bearer token; it is never shown.
    """

    size: str
    url: str
    model: str | None = None
    key: str | None = field(default=None, repr=False)

    @classmethod
    def read(cls, text: str, environ: Mapping[str, str] | None = None) -> "Spec":
        """A spec as the command line has it. The key is the value of the variable that is named.

        Args:
            environ: the process's own where it is None.

        Raises:
            ValueError: naming the value, without any password in it.
        """
        size, equals, address = text.partition("=")
        if not equals or not size.strip() or len(size) > 64:
            raise ValueError(f"upstream {_shown(text)!r}: not of the form {_FORM}")
        try:
            parts = urlsplit(address.strip())
            port = parts.port
        except ValueError as error:
            raise ValueError(f"upstream {_shown(text)!r}: {error}") from None
        if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
            raise ValueError(f"upstream {_shown(text)!r}: not of the form {_FORM}")
        if "@" in parts.netloc:
            raise ValueError(
                f"upstream {_shown(text)!r}: no user or password here; name the environment "
                "variable that holds the key: ?key_env=VARIABLE"
            )
        key = _key(text, parts, os.environ if environ is None else environ)
        path = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
        url = f"{parts.scheme}://{parts.netloc.lower()}{path}"
        return cls(size.strip(), url, parts.fragment or None, key)

    def headers(self) -> dict[str, str]:
        """What every request to it carries."""
        return {} if self.key is None else {"Authorization": f"Bearer {self.key}"}


def _key(text: str, parts: SplitResult, environ: Mapping[str, str]) -> str | None:
    said = parse_qsl(parts.query, keep_blank_values=True)
    if not said and not parts.query:
        return None
    if [name for name, _ in said] != ["key_env"]:
        raise ValueError(f"upstream {_shown(text)!r}: only ?key_env=VARIABLE may follow the path")
    name = said[0][1]
    key = environ.get(name, "").strip()
    if not key:
        raise ValueError(f"upstream {_shown(text)!r}: environment variable {name!r} is not set")
    if not key.isascii() or not key.isprintable():
        raise ValueError(f"upstream {_shown(text)!r}: the key in {name!r} is no header's value")
    return key


def _shown(text: str) -> str:
    """Without what may be a password, and not endless."""
    head, slashes, rest = text.partition("://")
    netloc, slash, path = rest.partition("/")
    return f"{head}{slashes}{netloc.rpartition('@')[2]}{slash}{path}"[:200]
