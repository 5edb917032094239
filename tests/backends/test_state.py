"""Saving and restoring: bit for bit, or not at all."""

import attrs
import numpy as np
import pytest
import tiny

from mens_core.errors import ModelError
from mens_core.exchange import TrainingState

RATE = 1e-2


def _same(left, right):
    assert left.step == right.step
    for kind in ("adapter", "optimizer"):
        one, other = getattr(left, kind), getattr(right, kind)
        assert set(one) == set(other)
        for name, array in one.items():
            assert array.dtype == np.float32
            assert array.tobytes() == other[name].tobytes()


def _random_state(backend, session, step=7):
    adapter = tiny.random_adapter(backend.state(session).adapter, seed=1)
    moments = {f"{name}.{moment}": array for name, array in adapter.items() for moment in ("exp_avg", "exp_avg_sq")}
    optimizer = {name: np.abs(array) for name, array in tiny.random_adapter(moments, seed=2).items()}
    return TrainingState(adapter=adapter, optimizer=optimizer, step=step)


@pytest.fixture
def window():
    return [tiny.batch_of(9, 5, seed=1), tiny.batch_of(7, seed=2)]


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_what_was_restored_comes_out_bit_for_bit(backend, session_of, family, method):
    session = session_of(family, method=method)
    state = _random_state(backend, session)
    _same(backend.state(backend.restore(session, state)), state)


def test_fresh_moments_come_out_as_none(backend, session_of, family):
    session = session_of(family)
    state = attrs.evolve(_random_state(backend, session), optimizer={}, step=3)
    _same(backend.state(backend.restore(session, state)), state)


def test_fresh_moments_are_zero_moments(backend, session_of, family, window):
    session = session_of(family)
    state = _random_state(backend, session, step=0)
    found = []
    zeros = {name: 0 * array for name, array in state.optimizer.items()}
    for optimizer in ({}, zeros):
        # moments left over from another run must not shine through
        session = backend.restore(session, attrs.evolve(state, step=4))
        session = backend.restore(session, attrs.evolve(state, optimizer=optimizer))
        backend.step(session, window, RATE)
        found.append(backend.state(session))
    _same(*found)


def test_a_copy_stays_as_it_was(backend, adapted, family, window):
    session, _ = adapted(family)
    backend.step(session, window, RATE)
    state = backend.state(session)
    kept = attrs.evolve(
        state,
        adapter={name: array.copy() for name, array in state.adapter.items()},
        optimizer={name: array.copy() for name, array in state.optimizer.items()},
    )
    backend.step(session, window, RATE)
    _same(state, kept)
    assert any((backend.state(session).adapter[name] != array).any() for name, array in state.adapter.items())


def test_the_session_does_not_change_what_it_was_given(backend, session_of, family, window):
    session = session_of(family)
    state = _random_state(backend, session)
    before = state.adapter.copy()
    copies = {name: array.copy() for name, array in before.items()}
    session = backend.restore(session, state)
    backend.step(session, window, RATE)
    for name, array in copies.items():
        np.testing.assert_array_equal(state.adapter[name], array)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_resumed_run_is_the_uninterrupted_one(backend, session_of, folders, family, window, method):
    session = session_of(family, method=method)
    start = attrs.evolve(_random_state(backend, session), optimizer={}, step=0)
    session = backend.restore(session, start)
    for _ in range(4):
        backend.step(session, window, RATE)
    expected = backend.state(session)
    session = backend.restore(session, start)
    for _ in range(2):
        backend.step(session, window, RATE)
    saved = backend.state(session)
    fresh = backend.open(tiny.plan_for(backend, folders[family], method=method), tiny.SHAPE)
    fresh = backend.restore(fresh, saved)
    for _ in range(2):
        backend.step(fresh, window, RATE)
    _same(backend.state(fresh), expected)


def test_all_misfits_are_listed_and_nothing_is_changed(backend, session_of, family):
    session = session_of(family)
    before = backend.state(session)
    state = _random_state(backend, session)
    names = sorted(state.adapter)
    missing, misshapen = names[0], names[1]
    adapter = {name: array for name, array in state.adapter.items() if name != missing}
    adapter |= {misshapen: adapter[misshapen][:, :-1], "nowhere.lora_A.weight": np.ones((4, 2), np.float32)}
    optimizer = {name: array for name, array in state.optimizer.items() if name != f"{misshapen}.exp_avg_sq"}
    with pytest.raises(ModelError) as caught:
        backend.restore(session, TrainingState(adapter=adapter, optimizer=optimizer, step=1))
    text = str(caught.value)
    for problem in (
        f"{missing} is missing",
        f"{misshapen} has shape",
        "nowhere.lora_A.weight is unknown",
        f"{misshapen}.exp_avg_sq is missing",
    ):
        assert problem in text
    _same(backend.state(session), before)


def test_an_empty_adapter_is_no_adapter(backend, session_of, family):
    with pytest.raises(ModelError, match="is missing"):
        backend.restore(session_of(family), TrainingState(adapter={}, optimizer={}, step=0))
