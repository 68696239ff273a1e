"""What a vLLM server tells of its load on `/metrics`; others tell nothing, and are taken so."""

import math
from dataclasses import dataclass

_NAMES = {
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "waiting",
    "vllm:kv_cache_usage_perc": "cache",
    "vllm:gpu_cache_usage_perc": "cache",  # its name until vLLM 0.10
}


@dataclass(frozen=True, slots=True)
class Figures:
    """Requests that run and wait there, and the share of its cache in use, 0 to 1.

    `others` of them are not ours: there may be more front ends than this one.
    """

    running: int
    waiting: int
    cache_used: float
    others: int = 0


def read_figures(text: str, ours: int) -> Figures | None:
    """The sums over the engines of one server (the mean, of shares); None if it is no vLLM.

    Args:
        ours: requests that we had there when it was asked.
    """
    found: dict[str, list[float]] = {"running": [], "waiting": [], "cache": []}
    for line in text.splitlines():
        name, brace, rest = line.partition("{")
        if not brace:
            name, _, rest = line.partition(" ")
        if name in _NAMES:
            value = _number(rest.rpartition("}")[2].split())
            if value is not None:
                found[_NAMES[name]].append(value)
    if not found["running"] or not found["waiting"]:
        return None
    running, waiting = (int(sum(found[name])) for name in ("running", "waiting"))
    cache = found["cache"]
    share = min(1.0, sum(cache) / len(cache)) if cache else 0.0
    return Figures(running, waiting, share, max(0, running + waiting - ours))


def _number(words: list[str]) -> float | None:
    try:
        value = float(words[0])
    except (IndexError, ValueError):
        return None
    return value if math.isfinite(value) and 0 <= value < 2**31 else None
