"""What a server counts, in Prometheus' format, by size."""

import math
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from star_elastic.serve.answering import Answering
from star_elastic.serve.policy import Load

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1)


def _device(load: Load) -> float:
    return math.nan if load.device_used is None else load.device_used


class Metrics:
    """Counters and times of one server, in a registry of their own."""

    def __init__(self, load: Callable[[], Load]) -> None:
        """`load` is asked whenever the figures are read."""
        self.registry = CollectorRegistry()
        self.requests = self._counter("requests", "requests that ended", "size", "outcome")
        self.refused = self._counter("refused", "requests no size took", "status")
        self.prompt_tokens = self._counter("prompt_tokens", "tokens of prompts", "size")
        self.cached_tokens = self._counter("cached_tokens", "of them not computed again", "size")
        self.tokens = self._counter("output_tokens", "tokens of answers", "size")
        self.switches = self._counter("switches", "answers begun anew by a larger size", "size")
        self.ttft = self._histogram("time_to_first_token", "from arrival", _SECONDS)
        self.tpot = self._histogram("time_per_output_token", "after the first", _PER_TOKEN)
        self.latency = self._histogram("request", "from arrival to the end", _SECONDS)
        for name, text, read in (
            ("queued_requests", "requests that wait for a place", lambda: load().queued),
            ("running_requests", "requests that have one", lambda: load().running),
            ("tokens_per_second", "of all sizes, over a second", lambda: load().tokens_per_second),
            ("cache_used_ratio", "share of the cache", lambda: load().cache_used),
            ("device_used_ratio", "share of the time; NaN if unknown", lambda: _device(load())),
        ):
            gauge = Gauge(f"star_elastic_{name}", text, registry=self.registry)
            gauge.set_function(read)

    def ended(self, answering: Answering, outcome: str, seconds: float) -> None:
        """Count a request that was begun; `outcome` is "ok", "failed" or "gone"."""
        self.requests.labels(answering.size, outcome).inc()
        if outcome == "ok":
            self.latency.labels(answering.size).observe(seconds)
        for size, counts in answering.counts.items():
            self.prompt_tokens.labels(size).inc(answering.asked.prompt_tokens)
            self.cached_tokens.labels(size).inc(counts.cached_tokens)
            self.tokens.labels(size).inc(counts.tokens)
            if counts.first is None or counts.last is None:
                continue
            self.ttft.labels(size).observe(counts.first - answering.began)
            if counts.tokens > 1:
                pace = (counts.last - counts.first) / (counts.tokens - 1)
                self.tpot.labels(size).observe(pace)
        for size in list(answering.counts)[1:]:
            self.switches.labels(size).inc()

    def text(self) -> bytes:
        """All of it, as `/metrics` tells it."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"star_elastic_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(
            f"star_elastic_{name}_seconds", text, ("size",), buckets=buckets, registry=self.registry
        )
