"""Holding rows out: what shares a text shares a part."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from mens_core.corpus.split import Groups, fingerprint

marks = st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=3), min_size=2, max_size=40)


@given(marks, st.floats(0, 0.99), st.integers(0, 3), st.randoms(use_true_random=False))
def test_rows_that_share_a_mark_share_a_part_in_whatever_order_they_come(
    rows: list[list[int]], fraction: float, seed: int, shuffler: random.Random
) -> None:
    def split(order: list[int]) -> dict[int, bool]:
        groups = Groups()
        for row in order:
            groups.add([fingerprint(str(mark)) for mark in rows[row]])
        return dict(zip(order, groups.held_out(fraction, seed), strict=True))

    order = list(range(len(rows)))
    parts = split(order)
    for one in order:
        for other in order:
            assert not set(rows[one]) & set(rows[other]) or parts[one] == parts[other]
    shuffler.shuffle(order)
    assert split(order) == parts


def test_about_the_asked_share_is_held_out() -> None:
    groups = Groups()
    for number in range(10_000):
        groups.add([fingerprint(str(number))])
    held_out = sum(groups.held_out(0.05, seed=0))
    # Binomial: five standard deviations are 5 * sqrt(10000 * 0.05 * 0.95) = 109.
    assert abs(held_out - 500) < 109


def test_a_new_row_moves_no_other_row_to_the_other_part() -> None:
    groups = Groups()
    for number in range(200):
        groups.add([fingerprint(str(number))])
    before = groups.held_out(0.3, seed=0)
    groups.add([fingerprint("new")])
    assert groups.held_out(0.3, seed=0)[:-1] == before
