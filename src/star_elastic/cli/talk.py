"""Whom `star-elastic chat` talks to: a server here; a checkpoint is in `talk_here`, with torch."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Protocol

from star_elastic.serve.client import Client, Served
from star_elastic.serve.text import Parts

Messages = Sequence[Mapping[str, str]]
Hear = Callable[[Parts], None]


@dataclass
class Account:
    """What is known of an answer when it is over."""

    sizes: list[str] = field(default_factory=list)  # that answered, one after the other
    tokens: int = 0
    why: list[str] = field(default_factory=list)  # that size
    began: float | None = None  # when the first token came, `time.monotonic`
    ended: float = 0.0
    cut: bool = False  # it may have no more tokens

    def note(self) -> None:
        """A token has come, or several."""
        self.ended = time.monotonic()
        if self.began is None:
            self.began = self.ended

    @property
    def tokens_per_second(self) -> float | None:
        """After the first token; None where that tells nothing."""
        if self.began is None or self.tokens < 2 or self.ended <= self.began:
            return None
        return (self.tokens - 1) / (self.ended - self.began)


class Partner(Protocol):
    """Somebody who answers at several sizes."""

    @property
    def sizes(self) -> list[str]:
        """Their names."""
        ...

    @property
    def chooses(self) -> bool:
        """Whether it can be left to choose the size."""
        ...

    def answer(self, messages: Messages, size: str | None, hear: Hear) -> Account:
        """Answer, telling every piece to `hear` as it comes. KeyboardInterrupt ends it cleanly.

        Args:
            size: None leaves the choice to the partner.

        Raises:
            ValueError: one line that says why there is no answer.
        """
        ...

    def close(self) -> None:
        """Free what is held."""
        ...


class OfServer:
    """A server of the OpenAI API; its policy chooses the size if nobody else does."""

    chooses = True

    def __init__(self, url: str, max_tokens: int | None) -> None:
        """Raises: ServerError: nobody there, or no model."""
        self._client, self._max_tokens = Client(url), max_tokens
        self._served = self._client.served()

    @property
    def sizes(self) -> list[str]:
        """Asked anew, as a server may be told to serve others."""
        self._served = self._client.served()
        return list(self._served.sizes)

    def answer(self, messages: Messages, size: str | None, hear: Hear) -> Account:
        """As `Partner.answer`."""
        served: Served = self._served
        model = served.model if size is None else served.sizes.get(size, f"{served.model}:{size}")
        body: dict[str, Any] = {"model": model, "messages": list(messages)}
        if self._max_tokens is not None:
            body["max_tokens"] = self._max_tokens
        account = Account([] if size is None else [size])
        with closing(self._client.ask(body)) as chunks:  # type: ignore[type-var]
            for chunk in chunks:
                self._note(chunk, account, hear)
        return account

    def close(self) -> None:
        self._client.close()

    def _note(self, chunk: dict[str, Any], account: Account, hear: Hear) -> None:
        for choice in chunk.get("choices") or ():
            account.note()
            account.cut = choice.get("finish_reason") == "length"
            delta = choice.get("delta") or {}
            reasoning = delta.get("reasoning") or delta.get("reasoning_content") or ""
            hear(Parts(reasoning, delta.get("content") or ""))
        if usage := chunk.get("usage"):
            account.tokens = usage.get("completion_tokens", 0)
        if elastic := chunk.get("elastic"):
            account.sizes = elastic.get("sizes", account.sizes)
            account.why = elastic.get("routed_because", [])
