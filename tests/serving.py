"""A real server of a tiny model, on a port of its own, in a thread of the test's process."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx2
import uvicorn
from byte_level import TOKENS, tokenizer
from models import elastic
from waiting import until

from star_elastic.checkpoint import Checkpoint
from star_elastic.model import ElasticModel
from star_elastic.serve.api.app import OPEN, build_app
from star_elastic.serve.guard import guarded
from star_elastic.serve.keys import Keys
from star_elastic.serve.opening import Capacity, Opened, open_service
from star_elastic.serve.running import configured
from star_elastic.serve.settings import Settings
from star_elastic.serve.upstream import Spec, Upstreams

NAME = "nano"
TEMPLATE = (
    "{% for m in messages %}<turn>{{ m['role'] }}: {{ m['content'] }}</turn>{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant:{% endif %}"
)
THINKING = TEMPLATE.replace("assistant:{%", "assistant:<think>{%")


def model(family: str = "llama", template: str | None = TEMPLATE, **changes: Any) -> ElasticModel:
    """A tiny parent with three sizes, full, small and prefix, that speaks bytes."""
    made = elastic(family, vocab_size=TOKENS, max_position_embeddings=256, **changes)
    made.tokenizer = tokenizer()
    made.tokenizer.chat_template = template
    return made


def upstreams(**sizes: "Server | list[Server]") -> Upstreams:
    """Servers of this kind as the replicas of some sizes."""
    named = {size: each if isinstance(each, list) else [each] for size, each in sizes.items()}
    return Upstreams(
        Spec(size, replica.url, f"{NAME}:{size}")
        for size, replicas in named.items()
        for replica in replicas
    )


@dataclass
class Server:
    """A server that runs."""

    url: str
    opened: Opened
    client: httpx2.Client
    loop: asyncio.AbstractEventLoop = field(repr=False)

    def chat(self, text: str = "hi", **fields: Any) -> httpx2.Response:
        """One question to the policy's id, unless told otherwise; 8 tokens, greedy."""
        body = {"model": NAME, "messages": [{"role": "user", "content": text}]}
        greedy = {"max_tokens": 8, "temperature": 0}
        return self.client.post("/v1/chat/completions", json={**body, **greedy, **fields})

    def complete(self, prompt: Any = "hi", **fields: Any) -> httpx2.Response:
        """The older API, likewise."""
        body = {"model": NAME, "prompt": prompt, "max_tokens": 8, "temperature": 0}
        return self.client.post("/v1/completions", json={**body, **fields})

    def events(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """All events of a stream, which must end as it should."""
        with self.client.stream("POST", path, json={**body, "stream": True}) as response:
            assert response.status_code == 200, response.read()
            lines = [line for line in response.iter_lines() if line]
        assert lines[-1] == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]

    def tokens(self) -> int:
        """How many the engine has made so far."""
        worker = self.opened.worker
        return (
            sum(size.output_tokens for size in worker.engine.stats.sizes.values()) if worker else 0
        )

    def wait_idle(self) -> int:
        """Until nothing runs and nothing waits; how many tokens were made meanwhile.

        Raises:
            AssertionError: something goes on.
        """
        worker, before = self.opened.worker, self.tokens()
        until(lambda: not self.opened.service.live and not (worker and worker.engine.busy))
        return self.tokens() - before

    @contextmanager
    def held(self) -> Iterator[None]:
        """The engine takes no step and no request while the block runs; all of it waits."""
        gate = threading.Event()
        assert self.opened.worker is not None
        self.opened.worker.post(gate.wait)
        try:
            yield
        finally:
            gate.set()


@contextmanager
def served(
    made: ElasticModel | Checkpoint,
    capacity: Capacity | None = None,
    settings: Settings | None = None,
    sizes: Sequence[str] | None = None,
    keys: Keys | None = None,
    upstreams: Upstreams | None = None,
    administers: bool = False,
    **guards: Any,
) -> Iterator[Server]:
    """A server of this model while the block runs; `guards` as `guarded` has them."""
    capacity = capacity or Capacity(slots=4, max_length=200, step_tokens=64)
    opened = open_service(made, NAME, capacity, settings, sizes, keys, upstreams)
    app = guarded(build_app(opened, administers), keys, open_paths=OPEN, **guards)
    server = uvicorn.Server(configured(app, "127.0.0.1", 0))
    loop = asyncio.new_event_loop()

    async def run() -> None:
        async with opened:
            await server.serve()

    thread = threading.Thread(target=loop.run_until_complete, args=(run(),), daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            yield Server(f"http://127.0.0.1:{port}", opened, client, loop)
    finally:
        server.should_exit = True
        thread.join()
        loop.close()
        opened.close()
