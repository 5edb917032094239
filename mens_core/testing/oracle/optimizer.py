"""One update: clipping by the global norm, then AdamW with decoupled weight decay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["BETA1", "BETA2", "EPSILON", "Moments", "adamw", "clipped", "global_norm"]

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8

Arrays = Mapping[str, NDArray[Any]]


class Moments(NamedTuple):
    """First and second moments by name, and how many updates they hold."""

    exp_avg: Arrays
    exp_avg_sq: Arrays
    step: int


def global_norm(gradient: Arrays) -> float:
    """Root of the sum of all squares."""
    return float(np.sqrt(sum(np.square(array, dtype=np.float64).sum() for array in gradient.values())))


def clipped(gradient: Arrays, max_norm: float) -> dict[str, NDArray[np.float64]]:
    """The gradient scaled down to ``max_norm``; as it is where its norm is no larger (Pascanu et al. 2013)."""
    factor = min(1.0, max_norm / global_norm(gradient))
    return {name: factor * array.astype(np.float64) for name, array in gradient.items()}


def adamw(
    parameters: Arrays, gradient: Arrays, moments: Moments, *, learning_rate: float, weight_decay: float
) -> tuple[dict[str, NDArray[np.float64]], Moments]:
    """One update (Loshchilov & Hutter 2019, algorithm 2).

    Args:
        parameters: by name.
        gradient: of the same names and shapes, clipped.
        moments: before the update.
        learning_rate: of this step.
        weight_decay: decoupled: θ loses learning_rate · weight_decay · θ whatever its gradient.

    Returns:
        Parameters and moments after it, float64.
    """
    step = moments.step + 1
    updated, first, second = {}, {}, {}
    for name, parameter in parameters.items():
        theta, g = parameter.astype(np.float64), gradient[name].astype(np.float64)
        m = first[name] = BETA1 * moments.exp_avg[name] + (1 - BETA1) * g
        v = second[name] = BETA2 * moments.exp_avg_sq[name] + (1 - BETA2) * g * g
        direction = (m / (1 - BETA1**step)) / (np.sqrt(v / (1 - BETA2**step)) + EPSILON)
        updated[name] = theta - learning_rate * (direction + weight_decay * theta)
    return updated, Moments(exp_avg=first, exp_avg_sq=second, step=step)
