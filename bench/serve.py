"""Claims about the server as its clients see it, over HTTP, in a process of its own.

python -m bench.serve mixed      1,000 requests of all sizes, 32 at a time: none fails, each gets
                                 the greedy answer that stock `generate` gives it alone (fp32)
python -m bench.serve overload   256 at a time, more than fit: 200, 429 and 503 only, flat memory
python -m bench.serve load       ten times the traffic, of a sudden: the policy holds the target
python -m bench.serve fuzz       10^5 bodies drawn from the API's own schema: no 5xx
"""

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx2
import torch

from bench.serve_fuzz import fuzz
from bench.serve_load import load
from bench.serving import NAME, Process, make_model, serving

SIZES = ["full", "middle", "small"]


def mixed(requests: int, concurrency: int, tokens: int = 12) -> dict[str, Any]:
    """Sizes, streams and disconnects mixed; every answer is compared with the one alone."""
    model = make_model("hybrid", 64, 3)
    draw = random.Random(0)
    prompts = [f"request {n}: {draw.getrandbits(64):016x}" for n in range(requests)]
    wanted = [draw.choice(SIZES) for _ in prompts]
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder) / "model")
        options = ("--slots", "32", "--max-length", "256")
        with serving(Path(folder) / "model", *options) as server:
            began = time.monotonic()
            found = asyncio.run(_ask_all(server, prompts, wanted, tokens, concurrency))
            seconds = time.monotonic() - began
            left = server.status()
    mixed_up = failed = 0
    for prompt, size, (status, text) in zip(prompts, wanted, found, strict=True):
        failed += status != 200
        mixed_up += status == 200 and text != _alone(model, size, prompt, tokens)
    return {
        "requests": requests,
        "concurrency": concurrency,
        "failed": failed,
        "not the answer alone": mixed_up,
        "distinct answers": len({text for _, text in found}),
        "seconds": round(seconds, 1),
        "left running": left["load"]["running"] + left["load"]["queued"],
    }


async def _ask_all(
    server: Process, prompts: Sequence[str], sizes: Sequence[str], tokens: int, concurrency: int
) -> list[tuple[int, str]]:
    """Status and text of each; one in ten is asked once more by a client that goes away."""
    gate = asyncio.Semaphore(concurrency)
    draw = random.Random(1)
    limits = httpx2.Limits(max_connections=concurrency)
    async with httpx2.AsyncClient(base_url=server.url, timeout=300, limits=limits) as client:

        async def ask(n: int) -> tuple[int, str]:
            body = {"model": f"{NAME}:{sizes[n]}", "prompt": prompts[n], "max_tokens": tokens}
            body |= {"temperature": 0, "stream": n % 2 == 0}
            async with gate:
                if n % 10 == 0:
                    await _go_away(client, {**body, "max_tokens": 150}, draw.random() / 5)
                return await _answer(client, body)

        return await asyncio.gather(*(ask(n) for n in range(len(prompts))))


async def _answer(client: httpx2.AsyncClient, body: dict[str, Any]) -> tuple[int, str]:
    async with client.stream("POST", "/v1/completions", json=body) as response:
        raw = await response.aread()
    if response.status_code != 200:
        return response.status_code, ""
    if not body["stream"]:
        return 200, json.loads(raw)["choices"][0]["text"]
    events = [line.removeprefix(b"data: ") for line in raw.split(b"\n\n") if line]
    assert events[-1] == b"[DONE]"
    return 200, "".join(
        choice["text"] for event in events[:-1] for choice in json.loads(event)["choices"]
    )


async def _go_away(client: httpx2.AsyncClient, body: dict[str, Any], after_s: float) -> None:
    try:
        async with asyncio.timeout(after_s):
            await _answer(client, body)
    except TimeoutError:
        return


def _alone(model: Any, size: str, prompt: str, tokens: int) -> str:
    ids = model.tokenizer(prompt, return_tensors="pt").input_ids
    with torch.inference_mode():
        whole = model[size].generate(ids, max_new_tokens=tokens, do_sample=False)
    return model.tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)


def overload(seconds: float, concurrency: int) -> dict[str, Any]:
    """More than the queue holds, for so long; memory is looked at once the first tenth is over."""
    model = make_model("hybrid", 128, 8)
    statuses: Counter[str] = Counter()
    resident: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder) / "model")
        options = ("--slots", "16", "--max-length", "256")
        policy = {"overload": {"queue": 64}}
        with serving(Path(folder) / "model", *options, policy=policy) as server:
            asyncio.run(_overload(server, seconds, concurrency, statuses, resident))
    early, late = resident[len(resident) // 10], resident[-1]
    return {
        "seconds": seconds,
        "concurrency": concurrency,
        "statuses": dict(statuses),
        "MiB after a tenth": round(early / 2**20, 1),
        "MiB at the end": round(late / 2**20, 1),
        "MiB a minute": round(_slope(resident[len(resident) // 10 :]) * 60 / 2**20, 2),
    }


async def _overload(
    server: Process,
    seconds: float,
    concurrency: int,
    statuses: Counter[str],
    resident: list[int],
) -> None:
    until = time.monotonic() + seconds
    draw = random.Random(2)
    limits = httpx2.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    async with httpx2.AsyncClient(base_url=server.url, timeout=300, limits=limits) as client:

        async def ask() -> None:
            while time.monotonic() < until:
                model = draw.choice([NAME, *(f"{NAME}:{size}" for size in SIZES)])
                body = {"model": model, "prompt": "x" * draw.randint(1, 60), "max_tokens": 16}
                body |= {"stream": draw.random() < 0.5}
                try:
                    status, _ = await _answer(client, body)
                    statuses[str(status)] += 1
                except httpx2.HTTPError as error:
                    statuses[type(error).__name__] += 1
                    status = 0
                if status in (429, 503):
                    await asyncio.sleep(draw.random())

        async def look() -> None:
            while time.monotonic() < until:
                resident.append(server.resident_bytes)
                await asyncio.sleep(1)

        await asyncio.gather(look(), *(ask() for _ in range(concurrency)))


def _slope(values: Sequence[int]) -> float:
    """A second, of values a second apart."""
    return statistics.linear_regression(range(len(values)), values).slope


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["mixed", "overload", "load", "fuzz"])
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--concurrency", type=int)
    parser.add_argument("--seconds", type=float, default=300)
    args = parser.parse_args()
    run = {
        "mixed": lambda: mixed(args.requests, args.concurrency or 32),
        "overload": lambda: overload(args.seconds, args.concurrency or 256),
        "load": lambda: load(args.seconds),
        "fuzz": lambda: fuzz(args.requests, args.concurrency or 8),
    }[args.what]
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    print(json.dumps({"claim": args.what, "machine": machine, **run()}, indent=1))


if __name__ == "__main__":
    main()
