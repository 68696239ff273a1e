"""By latency: the largest size that meets the targets on this machine, as fast as it is now.

Speeds are learned from what requests took. A time per token is the size's own, learned slowly, by a
factor of the moment that all sizes share, learned fast. So a size that was judged too slow in a
busy minute comes back once smaller ones speed up, though nobody has tried it since.
"""

from dataclasses import dataclass, field

from star_elastic.serve.policy.choose import Allowed, Load, Size, Wish


@dataclass(slots=True)
class _Pace:
    """Seconds a token, by size: an exponentially weighted estimate in the ratios."""

    fast: float
    slow: float
    now: float = 0.0  # the factor of the moment; 0 before anything was seen
    own: dict[str, float] = field(default_factory=dict)  # relative to the others

    def of(self, size: Size) -> float | None:
        """Seconds; a size nobody tried is taken to be as slow as it is large."""
        return self.now * self.own.get(size.name, size.active_params) if self.now else None

    def observe(self, size: Size, seconds: float) -> None:
        expected = self.of(size)
        if expected is None:
            self.now, self.own[size.name] = seconds / size.active_params, float(size.active_params)
        elif size.name not in self.own:
            self.own[size.name] = seconds / self.now
        else:
            self.now *= (seconds / expected) ** self.fast
            self.own[size.name] *= (seconds / expected) ** self.slow


class Speeds:
    """This machine's speed at each size, from what requests took."""

    def __init__(self, fast: float = 0.3, slow: float = 0.05) -> None:
        """
        Args:
            fast, slow: weight of the newest observation, in (0, 1], for all sizes and for its own.

        Raises:
            ValueError: a weight out of range.
        """
        if not (0 < fast <= 1 and 0 < slow <= 1):
            raise ValueError(f"speeds: weights {fast}, {slow} are not in (0, 1]")
        self._fast = fast
        self._prefill, self._decode = _Pace(fast, slow), _Pace(fast, slow)
        self.queued_s = 0.0  # how long requests wait for their slot

    def observe(
        self,
        size: Size,
        queued_s: float,
        prompt_tokens: int = 0,
        prefill_s: float = 0.0,
        output_tokens: int = 0,
        decode_s: float = 0.0,
    ) -> None:
        """What one request took. A phase of no tokens or no time teaches nothing."""
        self.queued_s += self._fast * (queued_s - self.queued_s)
        if prompt_tokens > 0 and prefill_s > 0:
            self._prefill.observe(size, prefill_s / prompt_tokens)
        if output_tokens > 0 and decode_s > 0:
            self._decode.observe(size, decode_s / output_tokens)

    def ttft_s(self, size: Size, prompt_tokens: int) -> float | None:
        """Seconds to the first token; None before anything was observed."""
        pace = self._prefill.of(size)
        return None if pace is None else self.queued_s + pace * prompt_tokens

    def tpot_s(self, size: Size) -> float | None:
        """Seconds per output token; None before anything was observed."""
        return self._decode.of(size)


class ByLatency:
    """Sizes that meet the operator's targets for every request, and the request's own limit."""

    def __init__(
        self,
        speeds: Speeds,
        ttft_ms: float | None = None,
        tpot_ms: float | None = None,
        margin: float = 0.9,
    ) -> None:
        """
        Args:
            speeds: kept up to date by the server.
            ttft_ms, tpot_ms: targets: to the first token, and for each further one.
            margin: the share of a target that an estimate may fill.
        """
        self._speeds, self._margin = speeds, margin
        self._ttft_ms, self._tpot_ms = ttft_ms, tpot_ms

    def allow(self, wish: Wish, load: Load, sizes: tuple[Size, ...]) -> Allowed:
        """Those that are fast enough; the smallest if none is. It refuses nothing."""
        targets = self._targets(wish)
        if not targets:
            return Allowed(sizes)
        quick = tuple(size for size in sizes if self._meets(size, wish))
        if len(quick) == len(sizes) or len(sizes) == 1:
            return Allowed(sizes)
        if not quick:
            return Allowed(sizes[-1:], f"latency: no size meets {targets}; the smallest is nearest")
        return Allowed(quick, f"latency: at most {quick[0].name} meets {targets}")

    def _targets(self, wish: Wish) -> str:
        said = {
            "TTFT": self._ttft_ms,
            "time per token": self._tpot_ms,
            "in all": wish.max_latency_ms,
        }
        return ", ".join(f"{name} {ms:g} ms" for name, ms in said.items() if ms is not None)

    def _meets(self, size: Size, wish: Wish) -> bool:
        """What nobody has measured yet is taken to be fast enough."""
        ttft = self._speeds.ttft_s(size, wish.prompt_tokens) or 0.0
        tpot = self._speeds.tpot_s(size) or 0.0
        estimates = [
            (ttft, self._ttft_ms),
            (tpot, self._tpot_ms),
            (ttft + tpot * wish.max_tokens, wish.max_latency_ms),
        ]
        return all(s * 1e3 <= ms * self._margin for s, ms in estimates if ms is not None)
