"""A step in traffic: arrivals become ten times as many, and the load policy holds the target.

Arrivals are drawn beforehand (Poisson, seeded) and do not wait for answers. The target is a p95
latency of whole requests. The largest size alone cannot carry the traffic after the step; that is
measured too, as is the smallest one alone.
"""

import asyncio
import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from bench.serving import NAME, Process, make_model, serving

_PROMPT, _TOKENS = 48, 16
_WINDOW_S = 5.0  # of the p95 that settles
_CALM_S = 15.0  # before the step
_POLICY = {"load": {"queue": 4, "tick_s": 0.1, "down_ticks": 2, "up_ticks": 50}}


@dataclass(frozen=True)
class Answered:
    """One request: when it came, how long it took (seconds), who answered; size "" if refused."""

    at: float
    latency_s: float
    size: str


def load(seconds: float) -> dict[str, Any]:
    """The policy against the largest and the smallest size pinned, on the same arrivals."""
    model = make_model("dense", 1536, 6, shares=(0.5, 0.25))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder) / "model")
        options = ("--slots", "16", "--max-length", "128")
        with serving(Path(folder) / "model", *options, policy=_POLICY) as server:
            capacity = {size: _capacity(server, size) for size in ("full", "small")}
            # too much for the one, not for the other
            after = 0.4 * capacity["small"]  # machines slow down by a third and more
            if after < 1.2 * capacity["full"]:
                raise RuntimeError(f"the sizes are too alike on this machine: {capacity}")
            target = 4 * _alone_s(server)
            runs = {
                name: _step(server, name, after, min(seconds, 90.0))
                for name in (NAME, f"{NAME}:full", f"{NAME}:small")
            }
            policy = runs[NAME]
            throughput = _throughputs(server)
    return {
        "requests a second the sizes can do": {k: round(v, 1) for k, v in capacity.items()},
        "requests a second before, after": [round(after / 10, 1), round(after, 1)],
        "target p95 seconds": round(target, 3),
        "p95 seconds once settled": {name: round(p95(late(run)), 3) for name, run in runs.items()},
        "p95 before the step": round(p95([a for a in policy if a.at < _CALM_S]), 3),
        "seconds to settle": settled_s(policy, target * 1.1),
        "changes of the cap": changes(policy),
        "share by size, settled": shares(late(policy)),
        "throughput at 32 at once over the smallest pinned": throughput,
    }


def p95(answered: list[Answered]) -> float:
    """Of their latencies, in seconds; those that were refused count as never."""
    ordered = sorted(a.latency_s if a.size else float("inf") for a in answered)
    return ordered[int(0.95 * (len(ordered) - 1))]


def late(run: list[Answered]) -> list[Answered]:
    """Those that came 10 s and more after the step."""
    return [a for a in run if a.at >= _CALM_S + 10]


def settled_s(run: list[Answered], limit_s: float) -> float | None:
    """Seconds after the step from which on every window's p95 is within the limit."""
    last = max(a.at for a in run)
    at, since = _CALM_S, None
    while at + _WINDOW_S <= last:
        within = p95([a for a in run if at <= a.at < at + _WINDOW_S]) <= limit_s
        since = (at if since is None else since) if within else None
        at += 0.5
    return None if since is None else since - _CALM_S


def changes(run: list[Answered]) -> dict[str, int]:
    """How often the answering size became smaller and larger, request by request of arrival."""
    sizes = [a.size for a in sorted(run, key=lambda a: a.at) if a.size]
    order = {"small": 0, "middle": 1, "full": 2}
    steps = [order[b] - order[a] for a, b in zip(sizes, sizes[1:], strict=False)]
    return {"down": sum(s < 0 for s in steps), "up": sum(s > 0 for s in steps)}


def shares(run: list[Answered]) -> dict[str, float]:
    """Who answered how much."""
    sizes = [a.size for a in run]
    return {size: round(sizes.count(size) / len(sizes), 3) for size in sorted(set(sizes))}


def _step(server: Process, model: str, after: float, seconds: float) -> list[Answered]:
    draw = random.Random(0)
    arrivals, at = [], 0.0
    while at < _CALM_S + seconds:
        at += draw.expovariate(after / 10 if at < _CALM_S else after)
        arrivals.append(at)
    return asyncio.run(_open_loop(server, model, arrivals))


async def _open_loop(server: Process, model: str, arrivals: list[float]) -> list[Answered]:
    limits = httpx2.Limits(max_connections=400, max_keepalive_connections=400)
    async with httpx2.AsyncClient(base_url=server.url, timeout=300, limits=limits) as client:
        start = time.monotonic()

        async def ask(at: float) -> Answered:
            await asyncio.sleep(start + at - time.monotonic())
            size = await _ask(client, model)
            return Answered(at, time.monotonic() - start - at, size)

        return list(await asyncio.gather(*(ask(at) for at in arrivals)))


async def _ask(client: httpx2.AsyncClient, model: str) -> str:
    """Who answered; "" if it was refused."""
    body = {"model": model, "prompt": "x" * _PROMPT, "max_tokens": _TOKENS}
    reply = await client.post("/v1/completions", json={**body, "logit_bias": {"1": -100}})
    return reply.headers.get("x-elastic-size", "") if reply.status_code == 200 else ""


def _alone_s(server: Process) -> float:
    """Seconds of one request at the largest size with nobody else there, the median of five."""

    async def ask() -> list[float]:
        async with httpx2.AsyncClient(base_url=server.url, timeout=60) as client:
            times = []
            for _ in range(5):
                began = time.monotonic()
                await _ask(client, f"{NAME}:full")
                times.append(time.monotonic() - began)
            return times

    return sorted(asyncio.run(ask()))[2]


def _capacity(server: Process, size: str, requests: int = 96, at_once: int = 16) -> float:
    """Requests a second of a size, as many at once as there are slots."""
    return _closed_loop(server, f"{NAME}:{size}", requests, at_once)


def _throughputs(server: Process) -> dict[str, float]:
    """By policy and by the smallest size pinned, in turns, once the policy is down."""
    rates: dict[str, list[float]] = {NAME: [], f"{NAME}:small": []}
    _closed_loop(server, NAME, 192, 32)  # pressure
    for _ in range(5):
        for model, found in rates.items():
            found.append(_closed_loop(server, model, 192, 32))
    policy, small = (sorted(found)[2] for found in rates.values())
    return {
        "policy": round(policy, 2), "small": round(small, 2), "ratio": round(policy / small, 3)
    }  # fmt: skip


def _closed_loop(server: Process, model: str, requests: int, at_once: int) -> float:
    async def run() -> float:
        gate = asyncio.Semaphore(at_once)
        async with httpx2.AsyncClient(base_url=server.url, timeout=300) as client:

            async def ask() -> None:
                async with gate:
                    await _ask(client, model)

            began = time.monotonic()
            await asyncio.gather(*(ask() for _ in range(requests)))
            return requests / (time.monotonic() - began)

    return asyncio.run(run())
