"""Rows put into bins by best fit are the rows alone: the same loss, the same gradients, and none sees another."""

import attrs
import numpy as np
import pytest
import tiny
import tolerances

from mens_core.exchange import IGNORE
from mens_core.text.pack import Batching
from mens_core.text.tokens import TokenRow, TokenRows

LENGTHS = (9, 3, 12, 5, 2, 7, 4, 11)  # no more than the batches of tiny.SHAPE
BIN = 16


def _rows():
    generator = np.random.default_rng(5)
    return TokenRows.of(
        TokenRow(generator.integers(3, tiny.VOCABULARY, n).astype(np.int32), generator.random(n) < 0.6) for n in LENGTHS
    )


@pytest.fixture
def bins():
    """Every bin a batch, all of them one window."""
    (window,) = Batching(batch_size=1, grad_accum=99, seed=3, bin_tokens=BIN).windows(_rows(), 0)
    return window


@pytest.fixture
def alone():
    """Every row a batch, all of them one window."""
    (window,) = Batching(batch_size=1, grad_accum=99, seed=3).windows(_rows(), 0)
    return window


def _step(backend, adapted, family, window):
    """(loss, gradient) of one step over the window."""
    session, _ = adapted(family, max_grad_norm=1e9)
    metrics = backend.step(session, window, 1e-3)
    moments = backend.state(session).optimizer
    gradient = {name: array for name, array in moments.items() if name.endswith(".exp_avg")}
    return float(metrics.loss_sum) / metrics.supervised_tokens, gradient


def _difference(found, expected):
    apart = np.sqrt(sum(np.square(found[name] - expected[name], dtype=np.float64).sum() for name in expected))
    return apart / np.sqrt(sum(np.square(array, dtype=np.float64).sum() for array in expected.values()))


def test_bins_have_the_loss_and_the_gradients_of_their_rows_alone(backend, adapted, family, bins, alone):
    assert len(bins) < len(alone)
    assert sum(len(batch.row_lengths) for batch in bins) == len(LENGTHS)
    packed, expected = (_step(backend, adapted, family, window) for window in (bins, alone))
    assert packed[0] == pytest.approx(expected[0], rel=tolerances.PACKING)
    assert _difference(packed[1], expected[1]) <= tolerances.PACKING


def test_rows_of_a_bin_that_saw_each_other_would_show(backend, adapted, family, bins, alone):
    glued = [
        attrs.evolve(
            batch,
            positions=np.arange(len(batch.input_ids), dtype=np.int32),
            row_lengths=np.array([len(batch.input_ids)], np.int32),
        )
        for batch in bins
    ]
    leaked, expected = (_step(backend, adapted, family, window) for window in (glued, alone))
    assert abs(leaked[0] / expected[0] - 1) > 100 * tolerances.PACKING
    assert _difference(leaked[1], expected[1]) > 100 * tolerances.PACKING


def test_no_row_of_a_bin_sees_another(backend, session_of, family, bins):
    batch = next(batch for batch in bins if len(batch.row_lengths) > 1)
    length = int(batch.row_lengths[0])
    other = batch.input_ids.copy()
    other[length:] = np.roll(other[length:], 1)
    session = session_of(family)
    silent = np.full_like(batch.targets, IGNORE)
    before, after = (
        backend.forward(session, attrs.evolve(batch, input_ids=ids, targets=silent))[:length]
        for ids in (batch.input_ids, other)
    )
    assert np.array_equal(before, after)
