"""The one training loop: one data order, one schedule, one telemetry for every backend."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import attrs

from mens_core.backend import Backend
from mens_core.contract import TrainingSpec
from mens_core.exchange import Batch, StepMetrics
from mens_core.text.encode import TokenRow
from mens_core.text.pack import batches, steps_per_epoch, windows
from mens_core.training.guards import check_finite
from mens_core.training.memory import peak_memory_bytes
from mens_core.training.schedule import learning_rate, warmup_for
from mens_core.training.telemetry import Telemetry

__all__ = ["Progress", "evaluate", "total_steps", "train"]


@attrs.define(kw_only=True)
class Progress:
    """What a finished loop leaves.

    Attributes:
        losses: mean loss of each step, in nats per supervised token.
        tokens: all tokens that went through the model.
        supervised_tokens: those of them that were trained on.
        seconds: wall time of the loop.
    """

    losses: list[float] = attrs.field(factory=list)
    tokens: int = 0
    supervised_tokens: int = 0
    seconds: float = 0.0

    def summary(self) -> dict[str, Any]:
        """The loop's part of the manifest's results."""
        return {
            "optimizer_steps": len(self.losses),
            "first_loss": self.losses[0],
            "last_loss": self.losses[-1],
            "tokens_trained": self.tokens,
            "supervised_tokens_trained": self.supervised_tokens,
            "train_seconds": self.seconds,
            "tokens_per_sec": self.tokens / self.seconds,
        }


def total_steps(num_rows: int, spec: TrainingSpec) -> int:
    """Optimizer steps of the whole run."""
    per_epoch = steps_per_epoch(num_rows, batch_size=spec.batch_size, grad_accum=spec.grad_accum)
    return min(per_epoch * spec.epochs, spec.max_steps or per_epoch * spec.epochs)


def train(
    backend: Backend, session: Any, rows: Sequence[TokenRow], spec: TrainingSpec, telemetry: Telemetry
) -> Progress:
    """Step through all windows of all epochs.

    The metrics of a step are read after the next one has been handed to the device, so that reading them never
    makes it wait.

    Raises:
        TrainingError: if a loss or gradient norm is not finite.
    """
    total = total_steps(len(rows), spec)
    warmup = warmup_for(total, spec.warmup_steps)
    progress, pending, begun = Progress(), None, time.perf_counter()
    for step, (epoch, window) in enumerate(_windows(rows, spec)):
        if step == total:
            break
        rate = learning_rate(
            step, schedule=spec.schedule, peak=spec.learning_rate, warmup_steps=warmup, total_steps=total
        )
        metrics = backend.step(session, window, rate)
        if pending is not None:
            _record(progress, telemetry, begun, *pending)
        pending = ({"epoch": epoch, "step": step + 1, "total_steps": total, "lr": rate}, window, metrics)
    if pending is not None:
        _record(progress, telemetry, begun, *pending)
    return progress


def evaluate(backend: Backend, session: Any, rows: Sequence[TokenRow], batch_size: int) -> float:
    """Mean cross-entropy over all supervised tokens of the rows, in nats."""
    sums = [backend.loss(session, batch) for batch in batches(rows, batch_size)]
    return sum(total for total, _ in sums) / sum(count for _, count in sums)


def _windows(rows: Sequence[TokenRow], spec: TrainingSpec) -> Iterator[tuple[int, list[Batch]]]:
    for epoch in range(spec.epochs):
        for window in windows(
            rows, batch_size=spec.batch_size, grad_accum=spec.grad_accum, seed=spec.seed, epoch=epoch
        ):
            yield epoch, window


def _record(
    progress: Progress,
    telemetry: Telemetry,
    begun: float,
    place: dict[str, Any],
    window: Sequence[Batch],
    metrics: StepMetrics,
) -> None:
    loss = float(metrics.loss_sum) / metrics.supervised_tokens
    grad_norm = float(metrics.grad_norm)
    check_finite(place["step"], loss, grad_norm)
    seconds = time.perf_counter() - begun
    tokens = sum(len(batch.input_ids) for batch in window)
    telemetry.emit(
        "step",
        {
            **place,
            "loss": loss,
            "grad_norm": grad_norm,
            "tokens": tokens,
            "supervised_tokens": metrics.supervised_tokens,
            "supervised_ratio": metrics.supervised_tokens / tokens,
            "step_seconds": seconds - progress.seconds,
            "tokens_per_sec": tokens / (seconds - progress.seconds),
            "peak_memory_bytes": peak_memory_bytes(),
        },
    )
    progress.losses.append(loss)
    progress.seconds = seconds
    progress.tokens += tokens
    progress.supervised_tokens += metrics.supervised_tokens
