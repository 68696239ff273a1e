"""Best first: every combination once, in order."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from star_elastic.train.likely import likely

LISTS = st.lists(st.lists(st.integers(-9, 9), min_size=1, max_size=4), min_size=1, max_size=4)


@given(LISTS)
def test_every_combination_once_and_the_best_first(scores: list[list[int]]) -> None:
    found = list(likely(scores))
    assert sorted(found) == sorted(product(*(range(len(each)) for each in scores)))
    totals = [sum(each[n] for each, n in zip(scores, picked, strict=True)) for picked in found]
    assert totals == sorted(totals, reverse=True)


def test_nothing_to_choose_is_one_choice() -> None:
    assert list(likely([])) == [()]


def test_scores_may_be_floats() -> None:
    assert next(likely([[0.1, 0.7], [2.0, -1.0]])) == pytest.approx((1, 0))
