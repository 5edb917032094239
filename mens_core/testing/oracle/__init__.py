"""The hooks in plain NumPy: the executable specification that every backend is held to.

::

    model folder ─▶ read_base ─▶ Oracle ─▶ logits ─▶ cross_entropy ─▶ directional_derivative, full_gradient
                       │                                                       │
                  NF4 by nf4.quantize                          clipped ─▶ adamw ─▶ the next adapter
                                                                                        │
                                                              merged: W + s · B A ◀─────┘

Nothing here is fast and everything is float64, but for 4-bit storage, whose bytes are defined by float32 arithmetic.
Gradients come by complex steps through the same forward functions, so that no derivative is written down that could be
wrong in the same way as a backend's. Each function follows one formula of its source; read together they say what
``mens_core.hookspecs`` says in prose.
"""

from __future__ import annotations

from mens_core.testing.oracle.decoder import Oracle, read_base
from mens_core.testing.oracle.derivatives import directional_derivative, full_gradient
from mens_core.testing.oracle.linear import linear, merged
from mens_core.testing.oracle.loss import cross_entropy
from mens_core.testing.oracle.nf4 import dequantize, quantize
from mens_core.testing.oracle.optimizer import Moments, adamw, clipped, global_norm
from mens_core.testing.oracle.schedule import scheduled_rate

__all__ = [
    "Moments",
    "Oracle",
    "adamw",
    "clipped",
    "cross_entropy",
    "dequantize",
    "directional_derivative",
    "full_gradient",
    "global_norm",
    "linear",
    "merged",
    "quantize",
    "read_base",
    "scheduled_rate",
]
