"""Apportioning: a weight is a share, no row is lost unless a size says so, repeats are even."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mens_core.corpus.shares import draw, parts

sources = st.lists(st.tuples(st.integers(0, 1000), st.floats(0.01, 100)), min_size=1, max_size=6)


def apportioned(sources, total=None):
    available, weights = zip(*sources, strict=True)
    return parts(available, weights, total)


@given(sources=sources)
def test_without_a_size_no_row_is_lost_and_shares_follow_the_weights(sources):
    given_parts = apportioned(sources)
    total = sum(part.rows for part in given_parts)
    assert all(part.rows >= part.available for part in given_parts)
    assert any(part.rows == part.available for part in given_parts)
    # Each count is rounded by at most half a row.
    assert all(abs(part.rows - part.share * total) <= 0.5 + 0.5 * len(sources) for part in given_parts)


@given(sources=sources, total=st.integers(1, 5000))
def test_a_size_is_met_exactly_and_shares_are_off_by_less_than_a_row(sources, total):
    given_parts = apportioned(sources, total)
    anything = any(rows for rows, _ in sources)
    assert sum(part.rows for part in given_parts) == (total if anything else 0)
    assert all(abs(part.rows - part.share * total) < 1 for part in given_parts)
    assert sum(part.share for part in given_parts) == pytest.approx(1 if anything else 0)


@given(rows=st.integers(1, 50), wanted=st.integers(0, 200), seed=st.integers(0, 9))
def test_a_draw_takes_every_row_equally_often_give_or_take_one(rows, wanted, seed):
    part = parts([rows], [1.0], wanted)[0]
    places = draw(part, random.Random(seed))  # noqa: S311
    assert len(places) == wanted
    counts = Counter(dict.fromkeys(range(rows), 0)) | Counter(places)
    times = [counts[place] for place in range(rows)]
    assert max(times) - min(times) <= 1


def test_three_to_one_is_three_to_one():
    assert [part.rows for part in parts([10, 100], [3, 1])] == [300, 100]
    assert [part.rows for part in parts([100, 10], [3, 1])] == [100, 33]
    assert [part.rows for part in parts([100, 100], [0.2, 1.2])] == [100, 600]
    assert [part.rows for part in parts([100, 0, 100], [1, 5, 1], 10)] == [5, 0, 5]
