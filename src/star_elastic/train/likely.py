"""Combinations of independent choices, the most likely first."""

import heapq
from collections.abc import Iterator, Sequence


def likely(scores: Sequence[Sequence[float]]) -> Iterator[tuple[int, ...]]:
    """Positions, one per list, by descending sum of their scores; every combination once."""
    ranked = [sorted(range(len(each)), key=lambda n, e=each: -e[n]) for each in scores]

    def total(ranks: tuple[int, ...]) -> float:
        return sum(s[order[rank]] for s, order, rank in zip(scores, ranked, ranks, strict=True))

    first: tuple[int, ...] = (0,) * len(scores)
    heap: list[tuple[float, tuple[int, ...]]] = [(-total(first), first)]
    seen: set[tuple[int, ...]] = {first}
    while heap:
        _, ranks = heapq.heappop(heap)
        yield tuple(order[rank] for order, rank in zip(ranked, ranks, strict=True))
        for axis, rank in enumerate(ranks):
            worse = (*ranks[:axis], rank + 1, *ranks[axis + 1 :])
            if rank + 1 < len(ranked[axis]) and worse not in seen:
                seen.add(worse)
                heapq.heappush(heap, (-total(worse), worse))
