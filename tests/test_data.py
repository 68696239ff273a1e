"""The order of micro-batches: every example once an epoch, and any position found again."""

import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from star_elastic.records import Batch, Example
from star_elastic.train.data import Batches

lengths = st.lists(st.integers(2, 30), min_size=1, max_size=40)


def made(sizes: list[int], tokens: int, seed: int = 0) -> Batches:
    """Examples that say which one they are in their first token."""
    rows = [Example([n + 1] * length, 1) for n, length in enumerate(sizes)]
    return Batches(rows, tokens, pad=0, seed=seed)


def contents(batch: Batch) -> list[list[int]]:
    return batch.input_ids.tolist()


def epoch(batches: Batches, examples: int) -> list[Batch]:
    """Micro-batches until so many examples were seen."""
    taken: list[Batch] = []
    stream = iter(batches)
    while sum(len(batch.input_ids) for batch in taken) < examples:
        taken.append(next(stream))
    return taken


@settings(max_examples=50, deadline=None)
@given(sizes=lengths, tokens=st.integers(16, 120), seed=st.integers(0, 5))
def test_an_epoch_has_every_example_once(sizes: list[int], tokens: int, seed: int) -> None:
    seen = [
        row for batch in epoch(made(sizes, tokens, seed), len(sizes)) for row in batch.input_ids
    ]
    found = Counter(int(row[0]) for row in seen)
    assert found == Counter(range(1, len(sizes) + 1))


@settings(max_examples=50, deadline=None)
@given(sizes=lengths, tokens=st.integers(16, 120))
def test_batches_fit_their_tokens(sizes: list[int], tokens: int) -> None:
    for batch in epoch(made(sizes, tokens), len(sizes)):
        assert batch.input_ids.numel() <= tokens or len(batch.input_ids) == 1


@settings(max_examples=50, deadline=None)
@given(sizes=lengths, tokens=st.integers(16, 120), taken=st.integers(0, 60))
def test_any_position_is_found_again(sizes: list[int], tokens: int, taken: int) -> None:
    batches = made(sizes, tokens)
    expected = itertools.islice(batches, taken, taken + 5)
    found = itertools.islice(batches.after(taken), 5)
    assert [contents(batch) for batch in found] == [contents(batch) for batch in expected]


def test_epochs_differ_in_order() -> None:
    batches = made([10] * 50, tokens=20)
    first, second = (
        [contents(batch) for batch in itertools.islice(batches.after(start), 25)]
        for start in (0, 25)
    )
    assert sorted(map(str, itertools.chain(*first))) == sorted(map(str, itertools.chain(*second)))
    assert first != second


def test_examples_without_a_target_are_left_out() -> None:
    rows = [Example([1, 2, 3], 3), Example([4, 5], 1)]
    assert contents(next(iter(Batches(rows, 16, 0, 0)))) == [[4, 5]]


def test_nothing_to_learn_is_an_error() -> None:
    with pytest.raises(ValueError, match="no example has a token to learn from"):
        Batches([Example([1, 2], 2)], 16, 0, 0)
