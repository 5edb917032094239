"""Packing: every row once in an epoch, none beside its own kind's limits, in an order that only the seed decides."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mens_core.exchange import IGNORE
from mens_core.text.overlong import fit_rows
from mens_core.text.pack import Batching, best_fit, epoch_order, pack
from mens_core.text.tokens import TokenRow, TokenRows


def _row(length, supervised):
    return TokenRow(np.arange(length, dtype=np.int32), np.arange(length) >= length - supervised)


def test_targets_are_shifted_by_one_inside_each_row():
    batch = pack(TokenRows.of([_row(4, 2), _row(3, 3)]))
    assert batch.input_ids.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert batch.positions.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert batch.targets.tolist() == [IGNORE, 2, 3, IGNORE, 1, 2, IGNORE]
    assert batch.row_lengths.tolist() == [4, 3]
    assert batch.supervised_tokens == 4
    assert {array.dtype for array in (batch.input_ids, batch.positions, batch.targets, batch.row_lengths)} == {
        np.dtype(np.int32)
    }


def test_packing_changes_no_row():
    rows = TokenRows.of([_row(4, 4), _row(3, 3)])
    pack(rows)
    assert rows.supervised.all()


lengths = st.lists(st.tuples(st.integers(2, 30), st.integers(1, 30)), min_size=1, max_size=20)


@given(lengths, st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**32), st.sampled_from([None, 30, 64]))
def test_an_epoch_meets_every_row_once_and_no_batch_exceeds_the_stated_shape(
    sizes, batch_size, grad_accum, seed, bin_tokens
):
    rows = TokenRows.of([_row(length, min(length, supervised)) for length, supervised in sizes])
    batching = Batching(batch_size=batch_size, grad_accum=grad_accum, seed=seed, bin_tokens=bin_tokens)
    shape = batching.shape(rows, 2)
    for epoch in range(2):
        seen = list(batching.windows(rows, epoch))
        assert len(seen) == batching.steps(rows)
        met = [int(length) for window in seen for batch in window for length in batch.row_lengths]
        assert sorted(met) == sorted(length for length, _ in sizes)
        for window in seen:
            assert 1 <= len(window) <= shape.batches
            for batch in window:
                assert len(batch.row_lengths) <= shape.rows
                assert len(batch.input_ids) <= shape.tokens <= (bin_tokens or 30) * batch_size
                assert batch.row_lengths.max() <= shape.longest_row
                assert batch.supervised_tokens <= shape.supervised


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(50, 80))
def test_best_fit_fills_bins_and_wastes_less_than_half(sizes, capacity):
    bins = best_fit(np.asarray(sizes), capacity)
    assert sorted(np.concatenate(bins).tolist()) == list(range(len(sizes)))
    filled = [sum(sizes[k] for k in places) for places in bins]
    assert max(filled) <= capacity
    # No two bins could be poured into one.
    assert len(filled) == 1 or sum(sorted(filled)[:2]) > capacity


def test_best_fit_takes_the_fullest_bin_with_room():
    assert [sorted(places.tolist()) for places in best_fit(np.asarray([6, 5, 3, 4, 1]), 10)] == [[0, 3], [1, 2, 4]]


@given(st.permutations([9, 8, 7, 5, 5, 3, 2, 1, 1]))
def test_how_many_bins_there_are_depends_on_the_lengths_alone(sizes):
    assert len(best_fit(np.asarray(sizes), 10)) == len(best_fit(np.asarray(sorted(sizes)), 10))


def test_the_order_depends_on_seed_and_epoch_alone():
    assert epoch_order(50, seed=1, epoch=0).tolist() == epoch_order(50, seed=1, epoch=0).tolist()
    assert epoch_order(50, seed=1, epoch=0).tolist() != epoch_order(50, seed=1, epoch=1).tolist()
    assert epoch_order(50, seed=1, epoch=0).tolist() != epoch_order(50, seed=2, epoch=0).tolist()


def test_bins_mix_other_rows_in_every_epoch():
    rows = TokenRows.of([_row(5, 1)] * 40)
    batching = Batching(batch_size=1, grad_accum=1, seed=0, bin_tokens=10)
    first, second = ({frozenset(places.tolist()) for places in batching.batches(rows, epoch)} for epoch in (0, 1))
    assert first != second


def test_no_row_is_no_batch():
    with pytest.raises(ValueError, match="at least one row"):
        pack(TokenRows.of([]))


def test_many_rows_take_four_bytes_each():
    """An epoch's order, and nothing else that grows: what is made of rows exists for some at a time."""
    # As a mapped column takes none.
    sources = np.zeros(1 << 19, np.int32)

    def prepared(rows):
        fitted, _ = fit_rows(rows, sources, ("one",), seq_len=8, policy="drop")
        batching = Batching(batch_size=64, grad_accum=1, seed=0)
        assert batching.shape(fitted, 1).tokens == 128
        assert len(next(batching.windows(fitted, 0))[0].row_lengths) == 64

    few, many = 1 << 18, 1 << 19
    growth = (_peak(prepared, many) - _peak(prepared, few)) / (many - few)
    assert growth < 4.5
    twin = (_peak(lambda rows: rows.lengths, many) - _peak(lambda rows: rows.lengths, few)) / (many - few)
    assert twin > 7, "the twin: eight bytes a row are seen"


def _peak(work, count):
    """Bytes that the work takes at most, of so many rows of two tokens."""
    offsets = np.arange(0, 2 * count + 1, 2)
    rows = TokenRows(
        np.zeros(2 * count, np.int32), np.ones(2 * count, bool), offsets[:-1], offsets[1:], np.ones(count, np.int64)
    )
    tracemalloc.start()
    try:
        work(rows)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
