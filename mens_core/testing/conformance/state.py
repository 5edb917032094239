"""``mens_state`` and ``mens_restore``: bit for bit, by copy, or not at all."""

from __future__ import annotations

import attrs
import numpy as np
import pytest

from mens_core.errors import ModelError
from mens_core.exchange import TrainingState
from mens_core.hf.keymap import linear_shapes
from mens_core.testing import tiny
from mens_core.testing.conformance.promises import promise
from mens_core.testing.conformance.workbench import Workbench, arrays_of, random_state, same_state, untouched

__all__ = [
    "test_a_copy_stays_as_it_was",
    "test_a_resumed_run_is_the_uninterrupted_one",
    "test_a_state_that_does_not_fit_is_refused_and_nothing_changes",
    "test_fresh_moments_come_out_as_none",
    "test_names_and_shapes_of_an_adapter_are_shared",
    "test_what_was_given_is_not_kept",
    "test_what_was_restored_comes_out_bit_for_bit",
]

_RATE = 1e-2
_WINDOW = [tiny.batch_of(9, 5, seed=1), tiny.batch_of(7, seed=2)]


def _random_state(workbench: Workbench, session: object) -> TrainingState:
    return random_state(workbench.backend.state(session).adapter)


def test_names_and_shapes_of_an_adapter_are_shared(workbench: Workbench, family: str) -> None:
    linears = linear_shapes(workbench.plan(family).layout)
    last = next(reversed(linears)).rpartition(".")[2]
    for targets in ("all-linear", last):
        session = workbench.session(family, targets=targets)
        chosen = [path for path in linears if targets == "all-linear" or path.endswith(f".{last}")]
        expected = {f"{path}.lora_A.weight": (4, linears[path][1]) for path in chosen}
        expected |= {f"{path}.lora_B.weight": (linears[path][0], 4) for path in chosen}
        found = {name: array.shape for name, array in workbench.backend.state(session).adapter.items()}
        wrong = sorted(name for name in expected.keys() | found if expected.get(name) != found.get(name))
        promise(
            not wrong,
            "mens_state",
            "under the names all backends share",
            f"{family}, targets {targets}: {', '.join(wrong[:4])} …",
        )


def test_what_was_restored_comes_out_bit_for_bit(workbench: Workbench) -> None:
    session = workbench.session(workbench.any_family)
    given = _random_state(workbench, session)
    with untouched(given) as unchanged:
        found = workbench.backend.state(workbench.backend.restore(session, given))
    promise(same_state(found, given), "mens_restore", "equals x bit for bit", "what comes out is not what went in")
    promise(unchanged[0], "mens_restore", "equals x bit for bit", "the state it was given was changed")


def test_fresh_moments_come_out_as_none(workbench: Workbench) -> None:
    backend, session = workbench.backend, workbench.session(workbench.any_family)
    # Moments left over from another run must not shine through.
    session = backend.restore(session, _random_state(workbench, session))
    fresh = attrs.evolve(_random_state(workbench, session), optimizer={}, step=3)
    session = backend.restore(session, fresh)
    found = backend.state(session)
    promise(same_state(found, fresh), "mens_restore", "means fresh moments", f"{len(found.optimizer)} moments came out")
    steps = []
    zeros = {name: 0 * moment for name, moment in _random_state(workbench, session).optimizer.items()}
    for optimizer in ({}, zeros):
        session = backend.restore(session, attrs.evolve(fresh, optimizer=optimizer))
        backend.step(session, _WINDOW, _RATE)
        steps.append(backend.state(session))
    promise(same_state(*steps), "mens_restore", "means fresh moments", "no moments and zero moments train differently")


def test_a_copy_stays_as_it_was(workbench: Workbench) -> None:
    backend = workbench.backend
    session, _ = workbench.adapted(workbench.any_family)
    backend.step(session, _WINDOW, _RATE)
    copy = backend.state(session)
    with untouched(copy) as unchanged:
        backend.step(session, _WINDOW, _RATE)
    promise(unchanged[0], "mens_state", "does not change when training goes on", "a step changed an earlier copy")
    moved = not same_state(backend.state(session), copy)
    promise(moved, "mens_state", "Copy adapter and optimizer out", "after a step the same old state is handed out")


def test_what_was_given_is_not_kept(workbench: Workbench) -> None:
    backend, session = workbench.backend, workbench.session(workbench.any_family)
    given = _random_state(workbench, session)
    session = backend.restore(session, given)
    before = backend.state(session)
    for array in arrays_of(given):
        np.add(array, 1, out=array)
    unmoved = same_state(backend.state(session), before)
    promise(unmoved, "mens_restore", "Replace adapter and optimizer", "the session lives on the arrays it was given")
    with untouched(given) as unchanged:
        backend.step(session, _WINDOW, _RATE)
    promise(unchanged[0], "mens_restore", "Replace adapter and optimizer", "a step changed what the session was given")


def test_a_resumed_run_is_the_uninterrupted_one(workbench: Workbench) -> None:
    backend, family = workbench.backend, workbench.any_family
    session, _ = workbench.adapted(family)
    for _ in range(2):
        backend.step(session, _WINDOW, _RATE)
    saved = backend.state(session)
    for _ in range(2):
        backend.step(session, _WINDOW, _RATE)
    fresh = backend.restore(workbench.open(family), saved)
    for _ in range(2):
        backend.step(fresh, _WINDOW, _RATE)
    same = same_state(backend.state(fresh), backend.state(session))
    promise(same, "mens_step", "a restored session goes on bit for bit", "a resumed run differs from the uninterrupted")


@pytest.mark.parametrize("fault", ["missing", "unknown", "wrong shape", "missing moment", "nothing at all"])
def test_a_state_that_does_not_fit_is_refused_and_nothing_changes(workbench: Workbench, fault: str) -> None:
    backend, session = workbench.backend, workbench.session(workbench.any_family)
    session = backend.restore(session, attrs.evolve(_random_state(workbench, session), step=5))
    before = backend.state(session)
    # Other values than those that are there, so that one that was taken over shows.
    adapter, optimizer = {name: array + 1 for name, array in before.adapter.items()}, dict(before.optimizer)
    # The last name, so that a backend that fills in as it goes has filled in the others.
    name = list(adapter)[-1]
    if fault == "missing":
        del adapter[name]
    elif fault == "unknown":
        name = "nowhere.lora_A.weight"
        adapter[name] = np.ones((4, 2), np.float32)
    elif fault == "wrong shape":
        adapter[name] = adapter[name][:, :-1]
    elif fault == "missing moment":
        name = f"{name}.exp_avg_sq"
        del optimizer[name]
    else:
        adapter = {}
    try:
        backend.restore(session, TrainingState(adapter=adapter, optimizer=optimizer, step=1))
    except ModelError as error:
        named = name in str(error)
        promise(named, "mens_restore", "missing, unknown or of another shape", f"{fault}: the error names no {name}")
    else:
        promise(kept=False, hook="mens_restore", phrase="missing, unknown", broken=f"{fault}: {name} was accepted")
    unchanged = same_state(backend.state(session), before)
    promise(unchanged, "mens_restore", "the session is then unchanged", f"{fault}: it was refused, but not unchanged")
