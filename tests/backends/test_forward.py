"""Logits: transformers' own, whatever else is in the batch."""

import attrs
import numpy as np
import pytest
import references
import tiny
import tolerances
import torch


def _distance(left, right):
    return np.abs(left - right).max()


@pytest.fixture
def batch():
    return tiny.batch_of(9, 5, 12, 5)


def _reference(folder, batch):
    with torch.no_grad():
        return references.logits_of(references.open_model(folder), batch).numpy()


def test_logits_are_those_of_transformers(backend, session_of, folders, family, batch):
    expected = _reference(folders[family], batch)
    assert 7 < np.abs(expected).max() < 30  # else the tolerance would mean something else
    assert _distance(backend.forward(session_of(family), batch), expected) <= tolerances.LOGITS


@pytest.mark.parametrize("mistake", ["a later position", "another head scale", "another token"])
def test_a_small_mistake_shows_in_the_logits(backend, session_of, folders, family, batch, mistake):
    expected = _reference(folders[family], batch)
    tokens, positions = batch.input_ids.copy(), batch.positions.copy()
    if mistake == "a later position":
        positions[1:9] += 1
    if mistake == "another token":
        tokens[0] += 1
    found = backend.forward(session_of(family), attrs.evolve(batch, input_ids=tokens, positions=positions))
    found = found * (1 + 1e-5 * (mistake == "another head scale"))
    assert _distance(found, expected) > tolerances.LOGITS


def test_a_row_does_not_feel_the_other_rows(backend, session_of, family, batch):
    session = session_of(family)
    together = backend.forward(session, batch)
    alone = np.concatenate([backend.forward(session, row) for row in tiny.rows_of(batch)])
    assert _distance(together, alone) <= tolerances.PACKING * np.abs(alone).max()


def test_rows_that_run_into_each_other_would_show(backend, session_of, family, batch):
    session = session_of(family)
    lengths = batch.row_lengths
    joined = np.array([lengths[0] + lengths[1], *lengths[2:]], np.int32)
    distance = _distance(
        backend.forward(session, attrs.evolve(batch, row_lengths=joined)), backend.forward(session, batch)
    )
    assert distance > tolerances.PACKING * 30


def test_rows_of_one_length_are_rows_too(backend, session_of, folders, family):
    batch = tiny.batch_of(6, 6, 6)
    assert (
        _distance(backend.forward(session_of(family), batch), _reference(folders[family], batch)) <= tolerances.LOGITS
    )


def test_a_single_token_is_a_row(backend, session_of, folders, family):
    batch = tiny.batch_of(1, 3, 1)
    assert (
        _distance(backend.forward(session_of(family), batch), _reference(folders[family], batch)) <= tolerances.LOGITS
    )


def test_no_position_sees_what_comes_later(backend, session_of, family, batch):
    session = session_of(family)
    tokens = batch.input_ids.copy()
    tokens[6] = 3 + (tokens[6] - 2) % (tiny.VOCABULARY - 3)
    before, after = (backend.forward(session, attrs.evolve(batch, input_ids=ids)) for ids in (batch.input_ids, tokens))
    np.testing.assert_array_equal(before[:6], after[:6])
    assert (np.abs(before[6:9] - after[6:9]).max(axis=1) > tolerances.LOGITS).all()


def test_an_adapter_with_b_zero_is_exactly_the_identity(backend, adapted, session_of, family, batch):
    base = backend.forward(session_of(family), batch)
    session, adapter = adapted(family)
    assert _distance(backend.forward(session, batch), base) > tolerances.LOGITS
    half = {name: array * (".lora_A." in name) for name, array in adapter.items()}
    session = backend.restore(session, attrs.evolve(backend.state(session), adapter=half))
    np.testing.assert_array_equal(backend.forward(session, batch), base)


def test_the_adapter_is_pefts(backend, adapted, folders, family, batch):
    session, adapter = adapted(family)
    model, _ = references.with_adapter(references.open_model(folders[family]), adapter, rank=4, alpha=8.0)
    with torch.no_grad():
        expected = references.logits_of(model, batch).numpy()
    assert _distance(backend.forward(session, batch), expected) <= tolerances.LOGITS


def test_another_adapter_scale_would_show(backend, adapted, folders, family, batch):
    session, adapter = adapted(family)
    model, _ = references.with_adapter(references.open_model(folders[family]), adapter, rank=4, alpha=8.001)
    with torch.no_grad():
        expected = references.logits_of(model, batch).numpy()
    assert _distance(backend.forward(session, batch), expected) > tolerances.LOGITS


def test_a_bfloat16_session_answers_in_float32(backend, session_of, folders, family, batch):
    found = backend.forward(session_of(family, dtype="bfloat16"), batch)
    expected = _reference(folders[family], batch)
    assert found.dtype == np.float32
    assert tolerances.LOGITS < _distance(found, expected) < tolerances.BFLOAT16_LOGITS
