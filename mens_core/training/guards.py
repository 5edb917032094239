"""Did anything get trained? Checks that turn a run that only looks healthy into a failed one."""

from __future__ import annotations

import math

import numpy as np

from mens_core.errors import TrainingError
from mens_core.exchange import TrainingState

__all__ = ["check_changed", "check_finite", "check_trainable"]


def check_trainable(state: TrainingState) -> None:
    """Refuse a session with nothing to train.

    Raises:
        TrainingError: if the adapter is empty.
    """
    if not state.adapter:
        raise TrainingError("the adapter has no tensor, so there is nothing to train", fix="check --targets")


def check_finite(step: int, loss: float, grad_norm: float) -> None:
    """Refuse a loss or gradient norm that is not finite; the backend has left the adapter as it was.

    Raises:
        TrainingError: naming step, loss and norm.
    """
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise TrainingError(
            f"step {step} gave loss {loss} and gradient norm {grad_norm}",
            expected="finite numbers",
            fix="lower --lr, or train with --dtype float32",
        )


def check_changed(before: TrainingState, after: TrainingState) -> None:
    """Refuse a run after which the adapter is what it was at the start.

    Raises:
        TrainingError: if no tensor changed, or one is not finite.
    """
    if not all(np.isfinite(tensor).all() for tensor in after.adapter.values()):
        raise TrainingError("the trained adapter holds values that are not finite", fix="lower --lr")
    if all(np.array_equal(before.adapter[name], tensor) for name, tensor in after.adapter.items()):
        raise TrainingError(
            "training changed nothing: the adapter is what it was at the start",
            expected="at least one tensor to change",
            fix="check the learning rate and the data",
        )
