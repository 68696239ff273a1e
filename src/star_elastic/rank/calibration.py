"""The calibration sample: some records as batches of tokens (arXiv 2511.16664: 1024 x 8192)."""

import random
from collections.abc import Iterator, Sequence
from typing import Any

from star_elastic.rank.blocks import CalibrationBatch
from star_elastic.records import Example, Record, collate, encode

_TOKENS = 8192  # of a batch, padding included, unless one record is longer


def calibration(
    tokenizer: Any,
    records: Sequence[Record],
    samples: int,
    max_length: int,
    seed: int = 0,
    device: Any = "cpu",
) -> list[CalibrationBatch]:
    """Token ids and mask, each (batch, length), of records drawn without replacement.

    Args:
        samples: records to draw; all of them where there are fewer.
        max_length: tokens of a record; longer ones are cut.

    Raises:
        ValueError: no record has a token.
    """
    count = min(samples, len(records))
    drawn = random.Random(f"rank/{seed}").sample(range(len(records)), count)
    examples = encode(tokenizer, [records[row] for row in drawn], max_length)
    examples = sorted((e for e in examples if e.ids), key=lambda example: len(example.ids))
    if not examples:
        raise ValueError(f"calibration: none of {count} records has a token")
    batches = (collate(rows, pad=0) for rows in _batches(examples))
    return [(batch.input_ids.to(device), batch.mask.to(device)) for batch in batches]


def _batches(examples: Sequence[Example]) -> Iterator[list[Example]]:
    """Runs of examples, shortest first, each padded to the longest of its batch."""
    rows: list[Example] = []
    for example in examples:
        if rows and (len(rows) + 1) * len(example.ids) > _TOKENS:
            yield rows
            rows = []
        rows.append(example)
    yield rows
