"""How long the servers behind are waited for, and when they are taken out."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class UpstreamSettings:
    """Times are in seconds, sizes in bytes.

    `first_byte_s` spans the queue of the server behind and the whole prompt. `usage_s` is what the
    count of tokens, which comes after the last token, is waited for. `tries` are in all, each on
    another replica while there is one; a `Retry-After` of `patience_s` at most is waited for where
    there is none. A replica is out after `failures` probes in a row, or at once if nobody listens;
    after as many failed requests in a row it rests for `rest_s`, unless no other is left. It may
    have `overload` times its fair share of the requests before those that fit it go elsewhere.
    """

    connect_s: float = 5.0
    first_byte_s: float = 300.0
    between_bytes_s: float = 60.0
    usage_s: float = 5.0
    probe_every_s: float = 1.0
    probe_timeout_s: float = 2.0
    failures: int = 3
    rest_s: float = 10.0
    tries: int = 3
    patience_s: float = 2.0
    overload: float = 1.25
    max_line: int = 2**20
    max_stream: int = 2**28

    def __post_init__(self) -> None:
        """Raises: ValueError: naming the field and its value."""
        for field in self.__slots__:
            if not getattr(self, field) > 0:
                raise ValueError(f"{field} = {getattr(self, field)}: not above 0")
        if self.overload < 1:
            raise ValueError(f"overload = {self.overload}: below 1, some requests fit nowhere")
