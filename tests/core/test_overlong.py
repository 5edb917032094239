"""Rows that are too long: every policy, from either side, with nothing lost that is not in the ledger."""

import attrs
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mens_core.errors import DataError
from mens_core.text import tokens
from mens_core.text.overlong import Loss, fit_rows
from mens_core.text.tokens import TokenRow, TokenRows

rows_of_marks = st.lists(st.lists(st.booleans(), min_size=1, max_size=40), min_size=1, max_size=12)


def laid_out(marks):
    """Rows whose tokens are numbered through, so that each of them is known by its id."""
    ids = iter(range(10_000))
    return TokenRows.of(
        TokenRow(np.asarray([next(ids) for _ in row], np.int32), np.asarray(row, np.bool_)) for row in marks
    )


def fit(rows, seq_len, policy, side="right", groups=None, sources=("one",)):
    places = np.zeros(len(rows), np.int32) if groups is None else np.asarray(groups, np.int32)
    return fit_rows(rows, places, sources, seq_len=seq_len, policy=policy, side=side)


@given(
    rows_of_marks,
    st.integers(2, 20),
    st.sampled_from(["drop", "truncate", "split"]),
    st.sampled_from(["right", "left"]),
)
def test_the_mask_stays_on_its_tokens_and_the_ledger_adds_up(marks, seq_len, policy, side):
    rows = laid_out(marks)
    trained = {int(k) for row in rows for k in row.input_ids[row.supervised]}
    try:
        kept, ledger = fit(rows, seq_len, policy, side)
    except DataError as error:
        assert "no row is left" in str(error)  # noqa: PT017 (either outcome is right, for other rows)
        return
    for row, counted in zip(kept, kept.trained, strict=True):
        assert 1 <= len(row.input_ids) <= seq_len
        assert {int(k) for k in row.input_ids[row.supervised]} == trained & {int(k) for k in row.input_ids}
        assert counted == np.count_nonzero(row.supervised[1:]) > 0
    lost = ledger.total
    assert kept.trained.sum() == lost.supervised_tokens - lost.supervised_tokens_cut - lost.supervised_tokens_dropped
    assert lost.rows == len(rows)
    assert lost.rows_overlong == sum(len(row) > seq_len for row in marks)
    assert lost.rows_overlong == lost.rows_dropped_overlong + lost.rows_truncated + lost.rows_split


@given(rows_of_marks, st.integers(2, 20))
def test_a_split_loses_no_token(marks, seq_len):
    rows = laid_out([[*row, True, True] for row in marks])
    kept, ledger = fit(rows, seq_len, "split")
    met = [int(k) for row in kept for k in row.input_ids]
    assert sorted(met) == met
    whole_parts = ledger.total.rows_dropped_unsupervised == 0
    assert not whole_parts or len(met) == sum(rows.lengths)


def test_truncation_keeps_the_start_or_the_end():
    rows = laid_out([[True] * 10])
    assert fit(rows, 4, "truncate", "right")[0][0].input_ids.tolist() == [0, 1, 2, 3]
    assert fit(rows, 4, "truncate", "left")[0][0].input_ids.tolist() == [6, 7, 8, 9]


def test_the_default_refuses_to_lose_more_than_a_twentieth_of_the_rows():
    short, long = [False, True], [True] * 50
    kept, ledger = fit(laid_out([short] * 19 + [long]), 8, "auto")
    assert (len(kept), ledger.total.rows_dropped_overlong) == (19, 1)
    with pytest.raises(DataError, match="2 of 20 rows are longer than 8 tokens"):
        fit(laid_out([short] * 18 + [long] * 2), 8, "auto")
    with pytest.raises(DataError, match="1 of 20 rows are longer"):
        fit(laid_out([short] * 19 + [long]), 8, "error")


def test_the_ledger_names_the_sources_that_lose_and_adds_up_the_many():
    marks = [[False, True]] * 30 + [[True] * 20] * 30
    sources = tuple(f"s{k:02}" for k in range(60))
    _, ledger = fit(laid_out(marks), 8, "drop", groups=range(60), sources=sources)
    assert len(ledger.by_source) == 21
    assert "s00" not in ledger.by_source
    assert ledger.by_source["s30"] == Loss(
        rows=1, supervised_tokens=19, rows_overlong=1, rows_dropped_overlong=1, supervised_tokens_dropped=19
    )
    assert ledger.by_source["(others)"].rows_overlong == 10
    sums = {name: sum(getattr(loss, name) for loss in ledger.by_source.values()) for name in attrs.fields_dict(Loss)}
    assert sums["rows_overlong"] == ledger.total.rows_overlong


def test_no_row_left_is_an_error_that_says_why():
    with pytest.raises(DataError, match="1 rows: 1 longer than 4 tokens, 0 unsupervised"):
        fit(laid_out([[True] * 9]), 4, "drop")


@given(
    rows_of_marks,
    st.integers(2, 20),
    st.sampled_from(["drop", "truncate", "split"]),
    st.integers(1, 5),
    st.integers(1, 3),
)
def test_it_does_not_matter_how_many_rows_are_looked_at_at_a_time(marks, seq_len, policy, at_a_time, sources):
    rows = laid_out(marks)
    named, groups = tuple("abc"[:sources]), [place % sources for place in range(len(marks))]

    def fitted():
        try:
            kept, ledger = fit(rows, seq_len, policy, groups=groups, sources=named)
        except DataError as error:
            return str(error)
        return [row.input_ids.tolist() for row in kept], kept.trained.tolist(), ledger

    with pytest.MonkeyPatch.context() as patch:
        at_once = fitted()
        patch.setattr(tokens, "_ROWS_AT_A_TIME", at_a_time)
        assert fitted() == at_once


def test_rows_that_all_fit_are_not_copied():
    rows = laid_out([[True] * 3] * 4)
    assert fit(rows, 8, "drop")[0] is rows
    assert fit(rows, 2, "truncate")[0] is not rows
