"""Bodies that the API must survive: every field with every extreme, and schemathesis's own."""

import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2

from bench.serving import NAME, Process, make_model, serving
from star_elastic.serve.schema import ChatRequest, CompletionRequest
from star_elastic.serve.schema.tokens import DetokenizeRequest, TokenizeRequest

_KINDS = {
    "/v1/chat/completions": (ChatRequest, {"messages": [{"role": "user", "content": "hi"}]}),
    "/v1/completions": (CompletionRequest, {"prompt": "hi"}),
    "/tokenize": (TokenizeRequest, {"prompt": "hi"}),
    "/detokenize": (DetokenizeRequest, {"tokens": [5, 6]}),
}
_NUMBERS = [-(2**63), -1, 0, 1, 2, 20, 128, 2**20, 2**31, 2**63, 10**400, 1e308, -0.5, 1e-320, 0.5]
_EXTREMES: list[Any] = [
    *_NUMBERS, "1", "", "\x00", "\ud800", "é😀", "a" * 5000, None, True, False, [], {}, [[]],
    [None], [1, "a"], {"a": 1}, {"": {"": {}}}, [{}], [{"role": "user"}], [0, 2**31], ["", "a"],
    [{"role": "user", "content": [{"type": "text", "text": "hi"}]}], {"12": 100, "-1": 5},
]  # fmt: skip
_UNKNOWN = [
    "tools",
    "echo",
    "thinking_budget",
    "reasoning",
    "thinking",
    "best_of",
    "x",
    "elastic.a",
]
_TOOL_EXAMPLES = 2000  # of schemathesis, for each route and phase


def fuzz(requests: int, concurrency: int) -> dict[str, Any]:
    """Status codes of so many of our bodies, and what schemathesis says of the same server."""
    model = make_model("dense", 64, 2)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder) / "model")
        options = ("--slots", "32", "--max-length", "64")
        policy = {"overload": {"queue": 10**6}, "load": None}
        with serving(Path(folder) / "model", *options, policy=policy) as server:
            began = time.monotonic()
            statuses = asyncio.run(_send(server, requests, concurrency))
            seconds = time.monotonic() - began
            tool = _schemathesis(server)
            after = httpx2.get(f"{server.url}/health").status_code
    return {
        "requests": requests,
        "statuses": dict(sorted(statuses.items())),
        "5xx": sum(n for status, n in statuses.items() if status >= 500),
        "seconds": round(seconds, 1),
        "schemathesis": tool,
        "healthy afterwards": after == 200,
    }


def bodies(seed: int) -> Iterator[tuple[str, bytes]]:
    """Paths and bodies: one valid body with one to three of its fields made extreme."""
    draw = random.Random(seed)
    while True:
        path, (kind, least) = draw.choice(list(_KINDS.items()))
        body: dict[str, Any] = {"model": NAME, "max_tokens": 2, **least}
        for _ in range(draw.choice([1, 1, 2, 3])):
            body[draw.choice([*kind.model_fields, *_UNKNOWN])] = draw.choice(_EXTREMES)
        text = json.dumps(body).encode()
        if draw.random() < 0.05:  # and now and then what is no JSON at all
            cut = draw.randrange(len(text))
            text = text[:cut] + draw.choice([b"", b"\xff", b"NaN", b"}", b"[" * 2000]) + text[cut:]
        yield path, text


async def _send(server: Process, requests: int, concurrency: int) -> Counter[int]:
    statuses: Counter[int] = Counter()
    drawn = bodies(0)
    left = iter(range(requests))
    async with httpx2.AsyncClient(base_url=server.url, timeout=120) as client:

        async def ask() -> None:
            for _ in left:
                path, body = next(drawn)
                headers = {"content-type": "application/json"}
                response = await client.post(path, content=body, headers=headers)
                statuses[response.status_code] += 1
                if response.status_code >= 500:
                    print(path, body[:300], response.text[:300], file=sys.stderr)

        await asyncio.gather(*(ask() for _ in range(concurrency)))
    return statuses


def _schemathesis(server: Process) -> str:
    """The last lines of its report on this server's own schema."""
    command = [
        str(Path(sys.executable).with_name("schemathesis")), "run", f"{server.url}/openapi.json",
        "--checks", "not_a_server_error", "--max-examples", str(_TOOL_EXAMPLES),
        "--phases", "fuzzing", "--workers", "2", "--no-color",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:  # it leaves notes where it runs
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    return " | ".join(line.strip() for line in done.stdout.splitlines()[-8:] if line.strip())
