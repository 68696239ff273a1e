"""Micro-batches in an order that one seed decides, so that any position can be found again."""

import random
from collections.abc import Iterator, Sequence

from star_elastic.records import Batch, Example, collate

_WINDOW = 8  # micro-batches whose rows are sorted by length together


class Batches:
    """Micro-batches of at most `tokens` padded tokens, for ever; the seed decides the n-th.

    An epoch shuffles the examples, sorts them by length inside windows of a few batches (so that
    little is padded), and shuffles the batches.
    """

    def __init__(self, examples: Sequence[Example], tokens: int, pad: int, seed: int):
        self.examples = [example for example in examples if len(example.ids) > example.start]
        self.tokens = tokens
        self.pad = pad
        self.seed = seed
        if not self.examples:
            raise ValueError("no example has a token to learn from")

    def __iter__(self) -> Iterator[Batch]:
        return self.after(0)

    def after(self, taken: int) -> Iterator[Batch]:
        """The stream from its `taken`-th micro-batch on."""
        epoch = 0
        while True:
            plan = self._plan(epoch)
            for rows in plan[taken:]:
                yield collate([self.examples[row] for row in rows], self.pad)
            taken, epoch = max(0, taken - len(plan)), epoch + 1

    def _plan(self, epoch: int) -> list[list[int]]:
        draw = random.Random(f"{self.seed}/{epoch}")
        order = list(range(len(self.examples)))
        draw.shuffle(order)
        mean = sum(len(example.ids) for example in self.examples) / len(self.examples)
        window = max(1, int(_WINDOW * self.tokens / mean))
        plan: list[list[int]] = []
        for start in range(0, len(order), window):
            rows = sorted(order[start : start + window], key=lambda row: self._length(row))
            plan += self._fill(rows)
        draw.shuffle(plan)
        return plan

    def _fill(self, rows: list[int]) -> list[list[int]]:
        """Cut rows, sorted by length, into batches that fit."""
        batches: list[list[int]] = []
        batch: list[int] = []
        for row in rows:
            if batch and self._length(row) * (len(batch) + 1) > self.tokens:
                batches.append(batch)
                batch = []
            batch.append(row)
        return [*batches, batch]

    def _length(self, row: int) -> int:
        return len(self.examples[row].ids)
