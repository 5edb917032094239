"""Gradients, updates, accumulation and a short run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mens_core.exchange import Batch, TrainingState
from mens_core.parity.bounds import ACCUMULATION, ADAMW, CURVE, GRADIENT, LOSS, MOMENTS, TRAJECTORY
from mens_core.parity.comparison import Comparison, apart, relative_norm, tensors_apart
from mens_core.parity.material import Material, state_like
from mens_core.parity.witness import BackendWitness, OracleWitness, Step
from mens_core.testing.oracle import Moments, adamw, clipped, directional_derivative, global_norm
from mens_core.training.schedule import learning_rate

__all__ = [
    "UNBOUNDED",
    "WEIGHT_DECAY",
    "compare_accumulation",
    "compare_gradients",
    "compare_gradients_with_oracle",
    "compare_runs",
    "compare_runs_with_oracle",
    "compare_updates",
    "compare_updates_with_oracle",
]

Arrays = Mapping[str, NDArray[Any]]

RATE = 1e-2
UNBOUNDED = 1e9  # a norm that no gradient reaches
WEIGHT_DECAY = 0.1
_DIRECTIONS = 4
_CURVE_STEPS = 12


def compare_gradients(
    left: BackendWitness, right: BackendWitness, adapter: Arrays, material: Material, layers: int
) -> Iterator[Comparison]:
    """Every adapter gradient of one window, entry by entry, and the norm a step reports."""
    (window, _) = material.windows(4)
    (found, step), (expected, other) = left.gradient(adapter, window), right.gradient(adapter, window)
    bound = GRADIENT.for_depth(layers)
    yield tensors_apart("adapter gradients", (left.name, found), (right.name, expected), bound)
    yield apart("gradient norm", (left.name, step.norm), (right.name, other.norm), bound, other.norm)


def compare_gradients_with_oracle(
    witness: BackendWitness, oracle: OracleWitness, adapter: Arrays, material: Material, layers: int
) -> Iterator[Comparison]:
    """Every adapter gradient by complex steps along normal directions.

    For a direction of independent standard normal entries the expected square of ⟨error, direction⟩ is the square of
    the error's Frobenius norm (Hutchinson 1990), so that the mean over a few directions estimates it.
    """
    (window, _) = material.windows(4)
    supervised = sum(batch.supervised_tokens for batch in window)
    gradient, step = witness.gradient(adapter, window)

    def loss(at: Arrays) -> Any:
        return sum(oracle.oracle.loss(at, batch) for batch in window) / supervised

    generator = np.random.Generator(np.random.Philox(key=2))
    errors = {}
    for name, found in gradient.items():
        directions = generator.standard_normal((_DIRECTIONS, *found.shape))
        derivatives = [directional_derivative(loss, adapter, {name: direction}) for direction in directions]
        products = (directions * found).reshape(_DIRECTIONS, -1).sum(axis=1)
        errors[name] = relative_norm(float(np.sqrt(np.square(products - derivatives).mean())), found)
    values = np.array(list(errors.values()))
    yield Comparison(
        what=f"adapter gradients, by {_DIRECTIONS} directions a tensor",
        left=witness.name,
        right=oracle.name,
        shape=f"{len(gradient)} tensors, {sum(array.size for array in gradient.values()):,} numbers",
        bound=GRADIENT.for_depth(layers),
        max_error=float(values.max()),
        mean_error=float(values.mean()),
    )
    expected = float(np.real(loss(adapter))) * supervised
    bound = LOSS.for_depth(layers)
    yield apart("loss of a step", (witness.name, step.loss), (oracle.name, expected), bound, expected)
    norm = global_norm(gradient)
    yield apart("gradient norm", (witness.name, step.norm), (oracle.name, norm), GRADIENT.for_depth(layers), norm)


def compare_updates(
    left: BackendWitness, right: BackendWitness, adapter: Arrays, material: Material
) -> Iterator[Comparison]:
    """One AdamW step in the middle of a run, with clipping and weight decay."""
    (window, _) = material.windows(4)
    ends = [witness.steps(state_like(adapter), [window], [RATE])[0].after for witness in (left, right)]
    names = (left.name, right.name)
    yield _parameters_apart("AdamW step, clipped and decayed", names, [end.adapter for end in ends])
    yield tensors_apart("moments after it", (names[0], ends[0].optimizer), (names[1], ends[1].optimizer), MOMENTS)


def compare_updates_with_oracle(
    clipping: BackendWitness, gradient: Arrays, adapter: Arrays, material: Material
) -> Iterator[Comparison]:
    """The same step by the specification, from the gradient that the backend itself has without clipping.

    Args:
        clipping: a backend whose session clips and decays.
        gradient: its gradient of the window.
        adapter: before the step.
        material: of the window.
    """
    (window, _) = material.windows(4)
    start = state_like(adapter)
    end = clipping.steps(start, [window], [RATE])[0].after
    moments = Moments(
        exp_avg={name: start.optimizer[f"{name}.exp_avg"].astype(np.float64) for name in adapter},
        exp_avg_sq={name: start.optimizer[f"{name}.exp_avg_sq"].astype(np.float64) for name in adapter},
        step=start.step,
    )
    spec = clipping.plan.contract.training
    updated, after = adamw(
        adapter, clipped(gradient, spec.max_grad_norm), moments, learning_rate=RATE, weight_decay=spec.weight_decay
    )
    names = (clipping.name, "oracle")
    yield _parameters_apart("AdamW step, clipped and decayed", names, [end.adapter, updated])
    expected = {f"{name}.exp_avg": array for name, array in after.exp_avg.items()}
    expected |= {f"{name}.exp_avg_sq": array for name, array in after.exp_avg_sq.items()}
    yield tensors_apart("moments after it", (names[0], end.optimizer), (names[1], expected), MOMENTS)


def compare_accumulation(witness: BackendWitness, adapter: Arrays, material: Material) -> Iterator[Comparison]:
    """Windows of eight uneven rows as 8×1, 4×2, 2×4 and 1×8, then a partial window of three."""
    reference = material.windows(1)
    whole = (f"{witness.name} 8×1", witness.gradient(adapter, reference[0])[0])
    ends = witness.steps(state_like(adapter), reference, [RATE, RATE])[-1].after.adapter
    for size in (2, 4, 8):
        windows, name = material.windows(size), f"{witness.name} {8 // size}×{size}"
        gradient, _ = witness.gradient(adapter, windows[0])
        yield tensors_apart("accumulated gradients", (name, gradient), whole, ACCUMULATION)
        after = witness.steps(state_like(adapter), windows, [RATE, RATE])[-1].after.adapter
        yield _parameters_apart("two windows, the last partial", (name, whole[0]), [after, ends])


def compare_runs(
    left: BackendWitness, right: BackendWitness, adapter: Arrays, material: Material
) -> Iterator[Comparison]:
    """A dozen steps from fresh moments, warmed up: the losses of every step, and where the adapters end."""
    runs = [_run(witness, adapter, material) for witness in (left, right)]
    losses = [np.array([step.loss for step in run]) for run in runs]
    names, ends = (left.name, right.name), [run[-1].after.adapter for run in runs]
    ratio = losses[0] / losses[1]
    yield apart(f"losses of {_CURVE_STEPS} steps", (names[0], ratio), (names[1], np.ones_like(ratio)), CURVE, 1.0)
    moved = global_norm({name: ends[1][name] - adapter[name] for name in adapter})
    drift = global_norm({name: ends[0][name].astype(np.float64) - ends[1][name] for name in adapter})
    entries = np.concatenate([np.abs(ends[0][name] - ends[1][name]).reshape(-1) for name in adapter])
    yield Comparison(
        what=f"adapter drift after {_CURVE_STEPS} steps",
        left=names[0],
        right=names[1],
        shape=f"{len(adapter)} tensors, {entries.size:,} numbers",
        bound=TRAJECTORY,
        max_error=drift / moved,
        mean_error=float(entries.mean()) / moved,
    )


def compare_runs_with_oracle(
    witness: BackendWitness, oracle: OracleWitness, adapter: Arrays, material: Material, layers: int
) -> Iterator[Comparison]:
    """The loss of every step of the same run, by the specification at the adapter the backend had there."""
    run = _run(witness, adapter, material)
    expected = [
        sum(oracle.loss(step.before.adapter, batch) for batch in window)
        for step, window in zip(run, _course(material), strict=True)
    ]
    ratio = np.array([step.loss for step in run]) / np.array(expected)
    bound = LOSS.for_depth(layers)
    what = f"losses of {_CURVE_STEPS} steps"
    yield apart(what, (witness.name, ratio), (oracle.name, np.ones_like(ratio)), bound, 1.0)


def _run(witness: BackendWitness, adapter: Arrays, material: Material) -> list[Step]:
    start = TrainingState(adapter=adapter, optimizer={}, step=0)
    rates = [
        learning_rate(step, schedule="linear", peak=RATE, warmup_steps=3, total_steps=_CURVE_STEPS)
        for step in range(_CURVE_STEPS)
    ]
    return witness.steps(start, _course(material), rates)


def _course(material: Material) -> Sequence[Sequence[Batch]]:
    """Windows of the run, in turns."""
    choices = material.windows(4)
    return [choices[step % len(choices)] for step in range(_CURVE_STEPS)]


def _parameters_apart(what: str, names: tuple[str, str], ends: Sequence[Arrays]) -> Comparison:
    # The bound is for parameters up to 0.5; what is trained whole may be larger, and is rounded accordingly.
    sizes = {name: 1.0 if ".lora_" in name else max(1.0, 2 * np.abs(array).max()) for name, array in ends[1].items()}
    left, right = ({name: array / np.float64(sizes[name]) for name, array in end.items()} for end in ends)
    return tensors_apart(what, (names[0], left), (names[1], right), ADAMW, RATE)
