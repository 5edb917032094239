"""What the core calls, but for ``mens_plan`` (``offer``). What each must do is written in ``mens_core.hookspecs``.

``mens_quantize`` and ``mens_dequantize`` are left out: only method qlora needs them, and ``offer`` declines it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from mens_core import Batch, ExecutionPlan, GenerateSettings, StepMetrics, TrainingState, hookimpl
from mens_core.errors import ModelError
from mens_core.exchange import IGNORE
from mens_numpy.session import Session, open_session
from mens_numpy.weights import Array

__all__ = [
    "mens_forward",
    "mens_generate",
    "mens_loss",
    "mens_merge",
    "mens_open",
    "mens_restore",
    "mens_state",
    "mens_step",
]


@hookimpl
def mens_open(plan: ExecutionPlan) -> Session:
    """NumPy takes any shape, so the largest batch is not asked for."""
    return open_session(plan)


@hookimpl
def mens_forward(session: Session, batch: Batch) -> Array:
    """(T, V) float32."""
    return session.logits(batch)


@hookimpl
def mens_loss(session: Session, batch: Batch) -> tuple[float, int]:
    """Sum in nats and count."""
    return session.loss(batch)[0], batch.supervised_tokens


@hookimpl
def mens_step(session: Session, window: Sequence[Batch], learning_rate: float) -> StepMetrics:
    """One update."""
    return session.step(window, learning_rate)


@hookimpl
def mens_state(session: Session) -> TrainingState:
    """Copies."""
    return session.state()


@hookimpl
def mens_restore(session: Session, state: TrainingState) -> Session:
    """The same session."""
    session.restore(state)
    return session


@hookimpl
def mens_generate(
    session: Session, prompt: Sequence[int], settings: GenerateSettings, on_token: Callable[[int], None] | None
) -> list[int]:
    """The likeliest token, again and again, each time from the whole row: slow, and nothing to get wrong."""
    tokens: list[int] = []
    while len(tokens) < settings.max_new_tokens and (not tokens or tokens[-1] not in settings.stop_tokens):
        row = np.array([*prompt, *tokens], np.int32)
        batch = Batch(
            input_ids=row,
            positions=np.arange(len(row), dtype=np.int32),
            targets=np.full_like(row, IGNORE),
            row_lengths=np.array([len(row)], np.int32),
        )
        tokens.append(int(session.logits(batch)[-1].argmax()))
        if on_token is not None:
            on_token(tokens[-1])
    return tokens


@hookimpl
def mens_merge(weight: Array, lora_a: Array, lora_b: Array, scale: float) -> Array:
    """W + scale · B A, newly allocated."""
    fit = weight.ndim == lora_a.ndim == lora_b.ndim == 2 and lora_a.shape[0] == lora_b.shape[1]
    if not fit or weight.shape != (lora_b.shape[0], lora_a.shape[1]):
        raise ModelError(
            "an adapter does not fit its weight",
            where=f"weight {weight.shape}, lora_A {lora_a.shape}, lora_B {lora_b.shape}",
            expected="weight (out, in), lora_A (rank, in), lora_B (out, rank)",
        )
    return weight + np.float32(scale) * (lora_b @ lora_a)
