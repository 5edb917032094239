"""Tiny models of every family with logits of honest size, and sessions that are opened once and reset for each test."""

import importlib

import numpy as np
import pytest
import tiny
import torch

from mens_core.exchange import TrainingState

# On matrices this small a second thread only waits for the first.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Family → model folder, see ``tiny.CONFIGS``."""
    root = tmp_path_factory.mktemp("tiny")
    for number, (family, config) in enumerate(tiny.CONFIGS.items()):
        tiny.write_model(root / family, family, config, seed=number)
    return {family: root / family for family in tiny.CONFIGS}


@pytest.fixture(params=tiny.CONFIGS)
def family(request):
    """Each family in turn."""
    return request.param


@pytest.fixture(scope="session")
def session_of(backend, folders):
    """Open a session on a family, or take the one that is open, with a zero adapter and fresh moments."""
    opened = {}

    def open_session(family, **fields):
        key = (family, *sorted(fields.items()))
        if key not in opened:
            session = backend.open(tiny.plan_for(backend, folders[family], **fields), tiny.SHAPE)
            opened[key] = session, backend.state(session)
        session, start = opened[key]
        return backend.restore(session, start)

    return open_session


@pytest.fixture
def adapted(backend, session_of):
    """A session whose adapter holds random numbers, and those numbers."""

    def open_adapted(family, **fields):
        session = session_of(family, **fields)
        adapter = tiny.random_adapter(backend.state(session).adapter)
        return backend.restore(session, TrainingState(adapter=adapter, optimizer={}, step=0)), adapter

    return open_adapted


@pytest.fixture
def goes_on(backend):
    """Check that a session restored after two steps takes two more to the same bytes as the one that went on."""

    def check(session, opened_anew, window, rate=1e-2):
        def two_steps(session):
            for _ in range(2):
                backend.step(session, window, rate)
            return backend.state(session)

        then = two_steps(session)
        expected = two_steps(session)
        found = two_steps(backend.restore(opened_anew(), then))
        for one, other in ((found.adapter, expected.adapter), (found.optimizer, expected.optimizer)):
            assert one.keys() == other.keys()
            assert all(np.array_equal(one[name], other[name]) for name in other)
        # The twin: where it stood before is elsewhere.
        assert not any(np.array_equal(then.adapter[name], expected.adapter[name]) for name in then.adapter)

    return check


@pytest.fixture(scope="session")
def part(backend):
    """A module of the backend by its mirrored name."""
    return lambda name: importlib.import_module(f"mens_{backend.name}.{name}")


@pytest.fixture(scope="session")
def array(backend):
    """NumPy → the backend's own array."""
    library = importlib.import_module({"torch": "torch", "jax": "jax.numpy"}[backend.name])
    return lambda values: library.asarray(np.array(values))
