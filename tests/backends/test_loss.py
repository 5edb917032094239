"""The loss: transformers' cross-entropy, summed over the supervised positions."""

import attrs
import numpy as np
import pytest
import references
import tiny
import tolerances
import torch
from torch.nn import functional

from mens_core.exchange import IGNORE


@pytest.fixture
def batch():
    return tiny.batch_of(9, 5, 12, 5)


def _reference(folder, batch):
    with torch.no_grad():
        return float(references.loss_sum(references.open_model(folder), batch))


def test_the_loss_is_transformers_cross_entropy_on_the_same_mask(backend, session_of, folders, family, batch):
    total, count = backend.loss(session_of(family), batch)
    assert count == batch.supervised_tokens == (batch.targets != IGNORE).sum()
    assert total == pytest.approx(_reference(folders[family], batch), rel=tolerances.LOSS)


def test_the_mask_agrees_with_the_labels_that_transformers_shifts_itself(backend, session_of, folders, family):
    row = tiny.batch_of(12)
    labels = np.concatenate([[IGNORE], row.targets[:-1]])
    model = references.open_model(folders[family])
    with torch.no_grad():
        mean = model(torch.tensor(row.input_ids)[None].long(), labels=torch.tensor(labels)[None].long()).loss
    total, count = backend.loss(session_of(family), row)
    assert total / count == pytest.approx(float(mean), rel=tolerances.LOSS)


@pytest.mark.parametrize("mistake", ["shifted mask", "unshifted targets", "one target more"])
def test_a_mistake_in_the_targets_would_show(backend, session_of, folders, family, batch, mistake):
    targets = batch.targets.copy()
    if mistake == "shifted mask":
        targets = np.where(np.roll(targets, 1) != IGNORE, np.roll(batch.input_ids, -1), IGNORE).astype(np.int32)
    if mistake == "unshifted targets":
        targets = np.where(targets != IGNORE, batch.input_ids, IGNORE)
    if mistake == "one target more":
        free = np.flatnonzero(targets[:8] == IGNORE)[0]
        targets[free] = batch.input_ids[free + 1]
    total, _ = backend.loss(session_of(family), attrs.evolve(batch, targets=targets))
    assert abs(total / _reference(folders[family], batch) - 1) > tolerances.LOSS


def test_the_loss_of_a_batch_is_the_sum_over_its_rows(backend, session_of, family, batch):
    session = session_of(family)
    total = sum(backend.loss(session, row)[0] for row in tiny.rows_of(batch))
    assert backend.loss(session, batch)[0] == pytest.approx(total, rel=tolerances.LOSS)


def test_nothing_supervised_is_no_loss(backend, session_of, family, batch):
    silent = attrs.evolve(batch, targets=np.full_like(batch.targets, IGNORE))
    assert backend.loss(session_of(family), silent) == (0.0, 0)


def test_bfloat16_costs_no_more_than_its_rounding(backend, session_of, family, batch):
    full, _ = backend.loss(session_of(family), batch)
    half, _ = backend.loss(session_of(family, dtype="bfloat16"), batch)
    assert tolerances.LOSS < abs(half / full - 1) < tolerances.BFLOAT16_LOSS


@pytest.mark.parametrize("chunk", [1, 5, 16, 17, 256])
def test_chunks_do_not_change_the_sum(part, array, chunk):
    generator = np.random.default_rng(3)
    hidden, head = generator.standard_normal((17, 8), np.float32), 3 * generator.standard_normal((31, 8), np.float32)
    targets = generator.integers(0, 31, 17)
    expected = functional.cross_entropy(
        torch.tensor(hidden).double() @ torch.tensor(head).double().T, torch.tensor(targets), reduction="sum"
    )
    found = part("loss").supervised_loss(array(hidden), array(head), array(targets), chunk=chunk)
    assert float(found) == pytest.approx(float(expected), rel=tolerances.LOSS)


def test_the_loss_stays_finite_where_a_plain_softmax_overflows(part, array):
    hidden, head = np.full((2, 4), 40, np.float32), np.array([[40] * 4, [-40] * 4, [39] * 4], np.float32)
    found = part("loss").supervised_loss(array(hidden), array(head), array(np.array([0, 1])))
    assert float(found) == pytest.approx(40 * 80 * 4, rel=tolerances.LOSS)
