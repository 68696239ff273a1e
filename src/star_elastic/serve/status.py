"""What a server does now, as `top` and the page show it."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from star_elastic.serve.answering import Answering
from star_elastic.serve.service import Service

_STATM = Path("/proc/self/statm")
_PAGE = 4096  # bytes


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of the weights (one copy, whatever the sizes), of copies beside it, of the caches."""

    weights: int = 0
    copies: int = 0
    cache: int = 0


def status(service: Service, memory: Memory) -> dict[str, Any]:
    """Requests, sizes, speed and memory, as JSON."""
    answering = list(service.live.values())
    return {
        "model": service.name,
        "seconds_up": round(time.time() - service.created, 1),
        "draining": service.draining,
        "ready": service.ready,
        "load": asdict(service.load()),
        "memory": {**asdict(memory), "process": _resident_bytes()},
        "sizes": [_size(service, name, answering) for name in service.sizes],
        "requests": [_request(each) for each in answering],
    }


def _size(service: Service, name: str, live: list[Answering]) -> dict[str, Any]:
    size, speeds = service.sizes[name], service.speeds
    tpot = speeds.tpot_s(size)
    return {
        "name": name,
        "active_params": size.active_params,
        "price": size.price,
        "ready": service.backends[name].ready,
        "requests": sum(each.size == name for each in live),
        "tokens": service.tokens[name]
        + sum(each.counts[name].tokens for each in live if name in each.counts),
        "time_per_token_ms": None if tpot is None else round(1e3 * tpot, 3),
    }


def _request(answering: Answering) -> dict[str, Any]:
    counts = answering.counts.get(answering.size)
    begun = counts is not None and counts.first is not None
    return {
        "id": answering.id,
        "size": answering.size,
        "sizes": list(answering.counts),
        "key": answering.key,
        "phase": "answering" if begun else "waiting",
        "prompt_tokens": answering.asked.prompt_tokens,
        "tokens": 0 if counts is None else counts.tokens,
        "max_tokens": answering.asked.max_tokens,
        "seconds": round(time.monotonic() - answering.began, 3),
        "why": answering.why,
    }


def _resident_bytes() -> int | None:
    """Of this process; None where the system does not tell."""
    try:
        return int(_STATM.read_text().split()[1]) * _PAGE
    except OSError:
        return None
