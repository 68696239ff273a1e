"""What a server does with a request, whatever the wire: read it, choose a size, answer, account.

A service knows the sizes, what answers at each, and the policies that choose; it belongs to one
asyncio loop.
"""

import asyncio
import json
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from star_elastic.serve.answering import Answering
from star_elastic.serve.answers import Asked, Backend
from star_elastic.serve.keys import Key, Keys
from star_elastic.serve.metrics import Metrics
from star_elastic.serve.policies import Policies
from star_elastic.serve.policy import Choice, Load, Size, Speeds, Wish
from star_elastic.serve.policy.cost import cost_of
from star_elastic.serve.prompts import Prompts
from star_elastic.serve.schema import (
    ChatRequest,
    CompletionRequest,
    Limits,
    ThinkingBudget,
    check_fits,
    read,
    size_of,
    thinking_budget,
)
from star_elastic.serve.schema.requests import Known
from star_elastic.serve.settings import Settings

_LARGE = 2**16  # bytes, above which the loop is not kept waiting by a body
Request = TypeVar("Request", bound=Known)
Talk = ChatRequest | CompletionRequest


class Draining(Exception):
    """The server takes no more requests; it is about to end."""


class Service:
    """Answers requests until it is drained."""

    def __init__(
        self,
        name: str,
        sizes: Sequence[Size],
        backends: Mapping[str, Backend],
        prompts: Prompts,
        limits: Limits,
        load: Callable[[], Load],
        settings: Settings | None = None,
        keys: Keys | None = None,
        thinks: bool = False,
    ) -> None:
        """
        Args:
            name: the model's, by which a policy chooses its size; "name:size" pins one.
            backends: what answers at each of `sizes`.
            keys: whose budgets and rates are held to.
            thinks: whether the model begins with reasoning.

        Raises:
            ValueError: settings that name a size nobody serves.
        """
        self.name, self.prompts, self.limits = name, prompts, limits
        self.settings = settings or Settings()
        self.load, self.thinks = load, thinks
        self.created = int(time.time())
        self.speeds = Speeds()
        self.metrics = Metrics(load)
        self.live: dict[str, Answering] = {}
        self.tokens: Counter[str] = Counter()  # made so far, by size
        self.draining = False
        self._budgets = {} if keys is None else keys.budgets(time.monotonic)
        self._rates = {} if keys is None else keys.limits(time.monotonic)
        self.set_sizes(sizes, backends)

    def set_sizes(self, sizes: Sequence[Size], backends: Mapping[str, Backend]) -> None:
        """Serve these from now on; what was begun goes on as it was.

        Raises:
            ValueError: settings that name a size nobody serves.
        """
        policies = Policies.of(self.settings, sizes, self.speeds, self._budgets, time.monotonic)
        self._policies = policies
        self.sizes = {size.name: size for size in policies.chooser.sizes}
        self.backends = dict(backends)

    @property
    def ready(self) -> bool:
        """Whether every size can answer now, and more requests are taken."""
        return not self.draining and all(backend.ready for backend in self.backends.values())

    async def watch(self) -> None:
        """Let the policies see the load between requests, too; goes on until it is cancelled.

        Who comes when others have just been served sees a queue that is short for a moment.
        """
        while (by_load := self._policies.by_load) is not None:
            by_load.observe(self.load())
            await asyncio.sleep(by_load.tick_s)

    async def begin(
        self, kind: type[Talk], body: bytes, key: Key | None = None, quality: str | None = None
    ) -> Answering:
        """Read a request and choose who answers it. Follow with `end`, whatever happens.

        Args:
            quality: what a header says, where the body says nothing.

        Raises:
            BadRequest, Refused, Draining
        """
        if self.draining:
            raise Draining
        request, ignored = await self.read(kind, body)
        pinned = size_of(request, self.name, self.sizes)
        asked = await self._asked(request, json.loads(body), key)
        wish = Wish(
            prompt_tokens=asked.prompt_tokens,
            max_tokens=asked.max_tokens * request.answers,
            size=pinned,
            max_latency_ms=request.elastic.max_latency_ms,
            max_cost=request.elastic.max_cost,
            quality=request.elastic.quality or quality,
            tier=None if key is None else key.tier,
            key=None if key is None else key.name,
        )
        choice = self._policies.chooser.choose(wish, self.load())
        judge = self._policies.judge
        if judge is not None and pinned is None:
            found = await judge.of(asked, self.backends[judge.smallest])
            wish = replace(wish, difficulty=found)
            choice = self._policies.chooser.choose(wish, self.load())
        if rate := self._rates.get(wish.key or ""):
            rate.admit(wish.prompt_tokens + wish.max_tokens)
        return self._opened(asked, wish, choice, ignored)

    async def read(self, kind: type[Request], body: bytes) -> tuple[Request, list[str]]:
        """A request, and the names of the fields that were ignored.

        Raises:
            BadRequest: see `schema.read`.
        """
        if len(body) > _LARGE:
            return await asyncio.to_thread(read, kind, body)
        return read(kind, body)

    def end(self, answering: Answering, outcome: str) -> None:
        """Account for a request that was begun; `outcome` is "ok", "failed" or "gone"."""
        if self.live.pop(answering.id, None) is None:
            return
        spent = answering.cost(self.sizes)
        used = sum(counts.tokens for counts in answering.counts.values())
        self._policies.cost.charge(answering.key, spent - answering.charged)
        if rate := self._rates.get(answering.key or ""):
            rate.give_back(max(0, answering.most_tokens - used))
        for name, counts in answering.counts.items():
            self.tokens[name] += counts.tokens
            size = self.sizes.get(name)
            if size is None or counts.first is None or counts.last is None:
                continue
            prompt = answering.asked.prompt_tokens - counts.cached_tokens
            prefill_s = counts.first - counts.began - counts.queued_s
            decode_s = counts.last - counts.first
            self.speeds.observe(
                size, counts.queued_s, prompt, prefill_s, counts.tokens - 1, decode_s
            )
        self.metrics.ended(answering, outcome, time.monotonic() - answering.began)

    async def _asked(self, request: Talk, body: dict[str, Any], key: Key | None) -> Asked:
        thinks = self.thinks and isinstance(request, ChatRequest)
        off = thinks and self._budget(request, 2**20).tokens == 0
        prompts, inside = await self.prompts.of(request, thinks=not off)
        most = check_fits(request, max(map(len, prompts)), self.limits)
        return Asked(
            request=request,
            body=body,
            prompts=prompts,
            max_tokens=most,
            thinking=self._budget(request, most) if thinks else None,
            inside=inside,
            salt="" if key is None else key.name,
        )

    def _budget(self, request: Talk, most: int) -> ThinkingBudget:
        said = self.settings.thinking
        return thinking_budget(
            request.thinking_token_budget,
            request.reasoning_effort,
            {str(effort): tokens for effort, tokens in said.efforts.items()},
            said.default,
            most,
            said.min_answer_tokens + self.prompts.end_mark_tokens,
        )

    def _opened(
        self, asked: Asked, wish: Wish, choice: Choice, ignored: Sequence[str]
    ) -> Answering:
        def escalate(after: str) -> Choice:
            return self._policies.chooser.choose(replace(wish, after=after), self.load())

        charged = cost_of(self.sizes[choice.size], wish)
        self._policies.cost.charge(wish.key, charged)
        id = uuid.uuid4().hex
        answering = Answering(
            id, asked, choice, self.backends, escalate, ignored, wish.key, charged=charged
        )
        self.live[id] = answering
        return answering
