"""The loss: the sum of the supervised tokens' cross-entropies."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mens_core.exchange import IGNORE

__all__ = ["cross_entropy"]

Array = NDArray[Any]


def cross_entropy(logits: Array, targets: Array) -> Any:
    """Σ logsumexp(z) - z[y] over the supervised positions, in nats.

    Args:
        logits: (T, V) float64, or complex128 for a complex step.
        targets: (T,) integer, each in 0 … V - 1, or ``IGNORE`` where nothing is supervised.

    Returns:
        A scalar of the logits' type; 0 if nothing is supervised.
    """
    supervised = np.flatnonzero(targets != IGNORE)
    chosen = logits[supervised]
    # Without the largest logit no power overflows; it is added again afterwards.
    top = chosen.real.max(axis=-1, keepdims=True)
    normaliser = np.log(np.exp(chosen - top).sum(axis=-1)) + top[:, 0]
    return (normaliser - chosen[np.arange(len(supervised)), targets[supervised]]).sum()
