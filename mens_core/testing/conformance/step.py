"""``mens_step``: gradient, clipping, accumulation, AdamW, and what a step must leave alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
import numpy as np
import pytest
from numpy.typing import NDArray

from mens_core.exchange import IGNORE, Batch, StepMetrics, TrainingState
from mens_core.testing import tiny
from mens_core.testing.conformance import tolerances
from mens_core.testing.conformance.promises import promise
from mens_core.testing.conformance.reference import Reference, adamw
from mens_core.testing.conformance.workbench import Workbench, same_state, untouched

__all__ = [
    "gradients_match",
    "test_a_batch_without_targets_adds_nothing",
    "test_a_step_that_is_not_finite_changes_nothing",
    "test_clipping_really_clips",
    "test_gradients_are_those_of_the_specification",
    "test_qlora_gradients_are_those_of_the_specification",
    "test_rate_zero_moves_the_moments_only",
    "test_something_is_learned",
    "test_the_base_never_changes",
    "test_the_cut_of_a_window_does_not_matter",
    "test_the_update_is_adamw",
]

_RATE = 1e-2
_UNBOUNDED = 1e9  # a norm that is never reached
_WINDOW = [tiny.batch_of(9, 5, seed=1), tiny.batch_of(12, 3, 4, seed=2, supervised=0.9)]

Arrays = Mapping[str, NDArray[Any]]


def _gradient(before: TrainingState, after: TrainingState) -> dict[str, NDArray[np.float64]]:
    """The gradient that a step folded into the first moments, clipped as it was."""
    found = {}
    for name in after.adapter:
        new = after.optimizer[f"{name}.exp_avg"].astype(np.float64)
        found[name] = (new - 0.9 * before.optimizer.get(f"{name}.exp_avg", np.zeros_like(new))) / 0.1
    return found


def _norm(arrays: Mapping[str, NDArray[np.floating]]) -> float:
    return float(np.sqrt(sum(np.square(array, dtype=np.float64).sum() for array in arrays.values())))


def _first_step(workbench: Workbench, family: str, window: list[Batch], **fields: object) -> tuple[StepMetrics, Arrays]:
    """What a step from the random adapter measures, and its gradient, not clipped."""
    session, _ = workbench.adapted(family, max_grad_norm=_UNBOUNDED, **fields)
    before = workbench.backend.state(session)
    metrics = workbench.backend.step(session, window, _RATE)
    return metrics, _gradient(before, workbench.backend.state(session))


def gradients_match(workbench: Workbench, family: str, **fields: object) -> None:
    """Fail unless every gradient, and what a step tells, is the specification's under the given fields."""
    metrics, found = _first_step(workbench, family, _WINDOW, **fields)
    reference = Reference(workbench.plan(family, **fields))
    _, adapter = workbench.adapted(family, max_grad_norm=_UNBOUNDED, **fields)
    for name, gradient in found.items():
        # Half the way along what was found, so that a wrong factor shows as surely as a wrong direction.
        drawn = np.random.default_rng([*name.encode()]).standard_normal(gradient.shape)
        direction = drawn / np.linalg.norm(drawn) + gradient / np.linalg.norm(gradient)
        expected = reference.slope(adapter, _WINDOW, {name: direction})
        size = float(np.linalg.norm(gradient) * np.linalg.norm(direction))
        far = abs(float((gradient * direction).sum()) - expected) / size
        promise(
            far <= tolerances.GRADIENT,
            "mens_step",
            "(sum of token losses of the window) / (supervised tokens of the window)",
            f"{family}: the gradient of {name} is {far:.3g} of its size off the specification's",
        )
    for told, expected in (
        ("grad_norm", _norm(found)),
        ("loss_sum", reference.loss(adapter, _WINDOW)),
    ):
        value = float(getattr(metrics, told))
        promise(
            abs(value - expected) <= tolerances.GRADIENT * expected,
            "mens_step",
            "Metrics",
            f"{family}: {told} is {value}, and not {expected}",
        )


def test_gradients_are_those_of_the_specification(workbench: Workbench, family: str) -> None:
    gradients_match(workbench, family)


def test_qlora_gradients_are_those_of_the_specification(workbench: Workbench) -> None:
    workbench.needs("qlora")
    gradients_match(workbench, workbench.any_family, method="qlora")


def test_clipping_really_clips(workbench: Workbench) -> None:
    session, _ = workbench.adapted(workbench.any_family, max_grad_norm=0.5)
    before = workbench.backend.state(session)
    metrics = workbench.backend.step(session, _WINDOW, _RATE)
    norm = _norm(_gradient(before, workbench.backend.state(session)))
    full = float(_first_step(workbench, workbench.any_family, _WINDOW)[0].grad_norm)
    promise(
        abs(norm - 0.5) <= tolerances.GRADIENT,
        "mens_step",
        "scaled down to the contract's ``max_grad_norm``",
        f"a gradient of norm {full} was to be clipped to 0.5 and has norm {norm}",
    )
    promise(
        abs(float(metrics.grad_norm) - full) <= tolerances.GRADIENT * full,
        "mens_step",
        "its global norm",
        f"grad_norm is {float(metrics.grad_norm)}, before clipping it was {full}",
    )


@pytest.mark.parametrize("batches", [2, 4, 8])
def test_the_cut_of_a_window_does_not_matter(workbench: Workbench, batches: int) -> None:
    shares = [0.9, 0.2, 0.5, 1, 1, 0.1, 0.8, 0.3]
    rows = [
        tiny.batch_of(length, seed=length, supervised=share)
        for length, share in zip([9, 3, 12, 5, 2, 7, 4, 11], shares, strict=True)
    ]
    size = len(rows) // batches
    window = [tiny.packed(rows[start : start + size]) for start in range(0, len(rows), size)]
    with untouched(window) as unchanged:
        cut = _first_step(workbench, workbench.any_family, window)
    whole = _first_step(workbench, workbench.any_family, [tiny.packed(rows)])
    promise(unchanged[0], "mens_step", "Metrics that may still live on the device", "the window was changed")
    far = _norm({name: cut[1][name] - whole[1][name] for name in whole[1]}) / _norm(whole[1])
    promise(
        far <= tolerances.ACCUMULATION,
        "mens_step",
        "the way a window is cut into batches does not matter",
        f"{batches} batches of {size} rows and one of 8 differ by {far:.3g} of the gradient",
    )


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_update_is_adamw(workbench: Workbench, weight_decay: float) -> None:
    session, _ = workbench.adapted(workbench.any_family, max_grad_norm=0.5, weight_decay=weight_decay)
    backend, after = workbench.backend, workbench.backend.state(session)
    for rate in (_RATE, _RATE / 3):
        before = after
        backend.step(session, _WINDOW, rate)
        after = backend.state(session)
        adapter, optimizer = adamw(before, _gradient(before, after), rate, weight_decay)
        far = max(float(np.abs(after.adapter[name] - adapter[name]).max()) for name in adapter) / rate
        promise(
            far <= tolerances.ADAMW and after.step == before.step + 1,
            "mens_step",
            "weight decay decoupled",
            f"step {after.step} with weight decay {weight_decay} is {far:.3g} of the learning rate off AdamW's",
        )
        for name, array in optimizer.items():
            near_zero = tolerances.MOMENT_NEAR_ZERO * np.abs(array).max()
            close = np.allclose(after.optimizer[name], array, rtol=tolerances.MOMENT, atol=near_zero)
            promise(close, "mens_step", "betas 0.9 and 0.999", f"{name} is not AdamW's moment")


def test_rate_zero_moves_the_moments_only(workbench: Workbench) -> None:
    session, adapter = workbench.adapted(workbench.any_family)
    workbench.backend.step(session, _WINDOW, 0.0)
    state = workbench.backend.state(session)
    for name, array in adapter.items():
        moved = not np.array_equal(state.adapter[name], array)
        promise(not moved, "mens_step", "one AdamW update", f"{name} moved at learning rate 0")
        still = not state.optimizer[f"{name}.exp_avg"].any()
        promise(not still, "mens_step", "one AdamW update", f"{name} got no gradient")


def test_a_batch_without_targets_adds_nothing(workbench: Workbench) -> None:
    silent = attrs.evolve(_WINDOW[0], targets=np.full_like(_WINDOW[0].targets, IGNORE))
    (_, one), (_, other) = (
        _first_step(workbench, workbench.any_family, window) for window in ([_WINDOW[1]], [silent, _WINDOW[1]])
    )
    far = _norm({name: one[name] - other[name] for name in one}) / _norm(one)
    promise(far <= tolerances.ACCUMULATION, "mens_step", "does not matter", f"it changed the gradient by {far:.3g}")


def test_a_step_that_is_not_finite_changes_nothing(workbench: Workbench) -> None:
    backend = workbench.backend
    session, adapter = workbench.adapted(workbench.any_family)
    backend.step(session, _WINDOW, _RATE)
    huge = {name: array * np.float32(1e20) for name, array in adapter.items()}
    session = backend.restore(session, attrs.evolve(backend.state(session), adapter=huge))
    before = backend.state(session)
    metrics = backend.step(session, _WINDOW, _RATE)
    finite = np.isfinite([float(metrics.loss_sum), float(metrics.grad_norm)]).all()
    promise(not finite, "mens_step", "is not finite", "loss and norm are told as finite where they cannot be")
    unchanged = same_state(backend.state(session), before)
    promise(unchanged, "mens_step", "stay as they were", "a step that was not finite changed the state")


def test_the_base_never_changes(workbench: Workbench) -> None:
    backend, session = workbench.backend, workbench.session(workbench.any_family)
    start, before = backend.state(session), backend.forward(session, _WINDOW[0])
    adapter = tiny.random_adapter(start.adapter)
    session = backend.restore(session, TrainingState(adapter=adapter, optimizer={}, step=0))
    for _ in range(3):
        backend.step(session, _WINDOW, _RATE)
    session = backend.restore(session, start)
    same = np.array_equal(backend.forward(session, _WINDOW[0]), before)
    promise(same, "mens_open", "the base never changes", "after three steps the base gives other logits")


def test_something_is_learned(workbench: Workbench) -> None:
    backend, session = workbench.backend, workbench.session(workbench.any_family)
    start = backend.state(session)
    half = {name: array * (".lora_A." in name) for name, array in tiny.random_adapter(start.adapter).items()}
    session = backend.restore(session, TrainingState(adapter=half, optimizer={}, step=0))
    before, _ = backend.loss(session, _WINDOW[0])
    for _ in range(10):
        backend.step(session, _WINDOW, _RATE)
    after, _ = backend.loss(session, _WINDOW[0])
    promise(after < 0.8 * before, "mens_step", "one AdamW update", f"ten steps: loss {before} → {after}")
