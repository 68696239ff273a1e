"""Micro-batches in pieces, so that a large size needs no more memory than the mean one does."""

import math
from collections.abc import Iterator, Mapping

from star_elastic.layout import Layout
from star_elastic.records import Batch
from star_elastic.submodel import Fields
from star_elastic.train.distillation import Lesson
from star_elastic.train.recipe import Stage


def piece_count(layout: Layout, stage: Stage, sizes: Mapping[str, Fields], fields: Fields) -> int:
    """Pieces for a size that costs more than the mean of the sizes as a stage draws them."""
    probs = stage.size_probs or dict.fromkeys(sizes, 1.0)
    weights = {name: probs.get(name, 0.0) for name in sizes}
    cost = {name: layout.count_active(layout.sizes_of(sizes[name])) for name in sizes}
    mean = sum(weights[name] * cost[name] for name in sizes) / sum(weights.values())
    own = layout.count_active(layout.sizes_of(fields))
    return min(stage.rows, math.ceil(own / mean - 1e-6))


def in_pieces(
    batch: Batch, lesson: Lesson | None, count: int
) -> Iterator[tuple[Batch, Lesson | None, float]]:
    """Rows by rows: a piece, what the teacher says of it, and its share of the targets."""
    if count == 1:
        yield batch, lesson, 1.0
        return
    total, start = max(1, int(batch.targets[:, 1:].sum())), 0
    for piece in batch.split(count):
        end = start + int(piece.targets[:, 1:].sum())
        taught = None if lesson is None else Lesson(lesson.hidden[start:end], lesson.head)
        yield piece, taught, (end - start) / total
        start = end
