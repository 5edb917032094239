"""The one training loop: one data order, one schedule, one telemetry for every backend."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import attrs

from mens_core.backend import Backend
from mens_core.contract import FineTuneContract
from mens_core.exchange import Batch, StepMetrics
from mens_core.text.pack import Batching, pack, total_steps
from mens_core.text.tokens import TokenRows
from mens_core.training.guards import check_finite
from mens_core.training.memory import peak_memory_bytes
from mens_core.training.schedule import learning_rate, warmup_for
from mens_core.training.telemetry import Telemetry

__all__ = ["Progress", "evaluate", "train"]


@attrs.define(kw_only=True)
class Progress:
    """What a finished loop leaves.

    Attributes:
        losses: mean loss of each step, in nats per supervised token.
        tokens: all tokens that went through the model.
        supervised_tokens: those of them that were trained on.
        seconds: wall time of the loop.
        step_seconds: of each step.
    """

    losses: list[float] = attrs.field(factory=list)
    step_seconds: list[float] = attrs.field(factory=list)
    tokens: int = 0
    supervised_tokens: int = 0
    seconds: float = 0.0

    def summary(self) -> dict[str, Any]:
        """The loop's part of the manifest's results; first and last loss are means of a tenth of the steps."""
        tenth = max(1, len(self.losses) // 10)
        return {
            "optimizer_steps": len(self.losses),
            "first_loss": sum(self.losses[:tenth]) / tenth,
            "last_loss": sum(self.losses[-tenth:]) / tenth,
            "tokens_trained": self.tokens,
            "supervised_tokens_trained": self.supervised_tokens,
            "train_seconds": self.seconds,
            "median_step_seconds": statistics.median(self.step_seconds),
            "tokens_per_sec": self.tokens / self.seconds,
        }


def train(
    backend: Backend, session: Any, rows: TokenRows, contract: FineTuneContract, telemetry: Telemetry
) -> Progress:
    """Step through all windows of all epochs.

    The metrics of a step are read after the next one has been handed to the device, so that reading them never
    makes it wait.

    Raises:
        TrainingError: if a loss or gradient norm is not finite.
    """
    spec, batching = contract.training, Batching.of(contract)
    total = total_steps(batching.steps(rows.lengths), spec)
    warmup = warmup_for(total, spec.warmup_steps)
    progress, pending = Progress(), None
    for step, (epoch, window) in enumerate(_windows(rows, batching, spec.epochs)):
        if step == total:
            break
        rate = learning_rate(
            step, schedule=spec.schedule, peak=spec.learning_rate, warmup_steps=warmup, total_steps=total
        )
        started = time.perf_counter()
        metrics = backend.step(session, window, rate)
        if pending is not None:
            _record(progress, telemetry, pending, ended=started)
        place = {"epoch": epoch, "step": step + 1, "total_steps": total, "lr": rate}
        pending = _Pending(place=place, window=window, metrics=metrics, started=started)
    if pending is not None:
        _record(progress, telemetry, pending, ended=None)
    return progress


def evaluate(backend: Backend, session: Any, rows: TokenRows, batch_size: int) -> float:
    """Mean cross-entropy over all supervised tokens of the rows, in nats."""
    starts = range(0, len(rows), batch_size)
    sums = [backend.loss(session, pack(rows[start : start + batch_size])) for start in starts]
    return sum(total for total, _ in sums) / sum(count for _, count in sums)


def _windows(rows: TokenRows, batching: Batching, epochs: int) -> Iterator[tuple[int, list[Batch]]]:
    for epoch in range(epochs):
        for window in batching.windows(rows, epoch):
            yield epoch, window


@attrs.frozen(kw_only=True)
class _Pending:
    """A step that has been handed to the device and not been read yet."""

    place: dict[str, Any]
    window: Sequence[Batch]
    metrics: StepMetrics
    started: float


def _record(progress: Progress, telemetry: Telemetry, step: _Pending, *, ended: float | None) -> None:
    """Read a step's metrics; it lasted until the next one began, or, being the last, until it was read."""
    loss = float(step.metrics.loss_sum) / step.metrics.supervised_tokens
    grad_norm = float(step.metrics.grad_norm)
    check_finite(step.place["step"], loss, grad_norm)
    seconds = (time.perf_counter() if ended is None else ended) - step.started
    tokens = sum(len(batch.input_ids) for batch in step.window)
    progress.losses.append(loss)
    progress.step_seconds.append(seconds)
    progress.seconds += seconds
    progress.tokens += tokens
    progress.supervised_tokens += step.metrics.supervised_tokens
    telemetry.emit(
        "step",
        {
            **step.place,
            "loss": loss,
            "grad_norm": grad_norm,
            "tokens": tokens,
            "supervised_tokens": step.metrics.supervised_tokens,
            "supervised_ratio": step.metrics.supervised_tokens / tokens,
            "step_seconds": seconds,
            "tokens_per_sec": tokens / seconds,
            "eta_seconds": progress.seconds / len(progress.losses) * (step.place["total_steps"] - step.place["step"]),
            "peak_memory_bytes": peak_memory_bytes(),
        },
    )
