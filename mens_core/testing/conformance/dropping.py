"""Dropout in ``mens_step``; the other hooks drop nothing."""

from __future__ import annotations

import attrs
import numpy as np

from mens_core.exchange import Batch, TrainingState
from mens_core.testing import tiny
from mens_core.testing.conformance.promises import promise
from mens_core.testing.conformance.workbench import Workbench, same_state

__all__ = [
    "test_another_step_seed_or_place_drops_otherwise",
    "test_dropout_of_the_same_state_is_the_same",
    "test_only_a_step_drops",
    "test_what_is_dropped_is_made_up_for",
]

_P = 0.3
_DRAWS = 20
_DOWNHILL = 0.01
_WINDOW = [tiny.batch_of(9, 5, seed=1), tiny.batch_of(12, 3, 4, seed=2, supervised=0.9)]


def _start(workbench: Workbench, step: int = 0, **fields: object) -> object:
    session, adapter = workbench.adapted(workbench.any_family, **({"dropout": _P} | fields))
    return workbench.backend.restore(session, TrainingState(adapter=adapter, optimizer={}, step=step))


def _loss(workbench: Workbench, step: int = 0, window: list[Batch] = _WINDOW, **fields: object) -> float:
    """Of a step under dropout that moves nothing."""
    return float(workbench.backend.step(_start(workbench, step, **fields), window, 0.0).loss_sum)


def test_dropout_of_the_same_state_is_the_same(workbench: Workbench) -> None:
    workbench.needs("dropout")
    found = []
    for _ in range(2):
        session = _start(workbench, step=3)
        workbench.backend.step(session, _WINDOW, 1e-2)
        found.append(workbench.backend.state(session))
    promise(same_state(*found), "mens_step", "goes on bit for bit", "the same step dropped other entries")


def test_another_step_seed_or_place_drops_otherwise(workbench: Workbench) -> None:
    workbench.needs("dropout")
    losses = {"step 0": _loss(workbench), "step 1": _loss(workbench, 1), "another seed": _loss(workbench, seed=7)}
    losses["another order"] = _loss(workbench, window=_WINDOW[::-1])
    distinct = len(set(losses.values())) == len(losses)
    promise(distinct, "mens_step", "A mask is a function of", f"equal masks where they must differ: {losses}")


def test_what_is_dropped_is_made_up_for(workbench: Workbench) -> None:
    workbench.needs("dropout")
    backend, family = workbench.backend, workbench.any_family
    # An adapter that goes downhill by little: its effect is of one sign, and the chance in it small beside it.
    session = workbench.session(family)
    drawn = tiny.random_adapter(backend.state(session).adapter)
    half = {name: array * (".lora_A." in name) for name, array in drawn.items()}
    start = TrainingState(adapter=half, optimizer={}, step=0)
    session = backend.restore(session, start)
    backend.step(session, _WINDOW, 0.0)
    slopes = backend.state(session).optimizer
    adapter = {name: array - np.float32(_DOWNHILL) * slopes[f"{name}.exp_avg"] for name, array in half.items()}
    base, plain = (
        sum(backend.loss(backend.restore(session, attrs.evolve(start, adapter=values)), batch)[0] for batch in _WINDOW)
        for values in (half, adapter)
    )
    session, losses = workbench.session(family, dropout=_P), []
    for step in range(_DRAWS):
        session = backend.restore(session, TrainingState(adapter=adapter, optimizer={}, step=step))
        losses.append(float(backend.step(session, _WINDOW, 0.0).loss_sum))
    # Without the division the effect would be smaller by the share p of it.
    off = (sum(losses) / _DRAWS - plain) / (base - plain)
    promise(
        abs(off) <= _P / 2,
        "mens_step",
        "the others are divided by 1 - p",
        f"under dropout of {_P} the adapter's effect on the loss is on average {off:.0%} smaller than without",
    )


def test_only_a_step_drops(workbench: Workbench) -> None:
    workbench.needs("dropout")
    backend, found = workbench.backend, []
    for p in (0.0, _P):
        # Whatever a step leaves behind must not reach the others.
        backend.step(_start(workbench, dropout=p), _WINDOW, 1e-2)
        session = _start(workbench, dropout=p)
        found.append((backend.forward(session, _WINDOW[0]).tobytes(), backend.loss(session, _WINDOW[0])))
    promise(found[0] == found[1], "mens_step", "no other hook drops anything", "forward or loss differ under dropout")
