"""The one training loop: one data order, one schedule, one telemetry for every backend."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import attrs

from mens_core.backend import Backend
from mens_core.contract import FineTuneContract
from mens_core.exchange import Batch, StepMetrics
from mens_core.text.pack import Batching, pack, total_steps
from mens_core.text.tokens import TokenRows
from mens_core.training.guards.during import StepGuards
from mens_core.training.memory import peak_memory_bytes
from mens_core.training.progress import Progress
from mens_core.training.schedule import learning_rate, warmup_for
from mens_core.training.telemetry import Telemetry

__all__ = ["Pauses", "evaluate", "train"]


class Pauses(Protocol):
    """What is done between two steps, see ``mens_core.training.between``."""

    def due(self, step: int) -> bool:
        """Whether anything is to be done after this step; asked once a step."""

    def act(self, step: int, epoch: int) -> bool:
        """Do it, with all figures up to this step known; true ends the run."""


def train(
    backend: Backend,
    session: Any,
    rows: TokenRows,
    contract: FineTuneContract,
    telemetry: Telemetry,
    progress: Progress,
    pauses: Pauses,
    guards: StepGuards,
) -> None:
    """Step through the windows of all epochs, from where the progress stands.

    The metrics of a step are read after the next one has been handed to the device, so that reading them never
    makes it wait, unless there is something to do in between.

    Raises:
        TrainingError: if a guard ends the run, such as for a loss that is not finite.
    """
    spec, batching = contract.training, Batching.of(contract)
    per_epoch = batching.steps(rows)
    total = total_steps(per_epoch, spec)
    warmup = warmup_for(total, spec.warmup_steps)
    pending = None
    for step, window in _windows(rows, batching, progress.steps, total, per_epoch):
        rate = learning_rate(
            step, schedule=spec.schedule, peak=spec.learning_rate, warmup_steps=warmup, total_steps=total
        )
        started = time.perf_counter()
        metrics = backend.step(session, window, rate)
        if pending is not None:
            _record(progress, telemetry, guards, pending, ended=started)
        place = {"epoch": step // per_epoch, "step": step + 1, "total_steps": total, "lr": rate}
        pending = _Pending(place=place, window=window, metrics=metrics, started=started)
        if pauses.due(step + 1):
            _record(progress, telemetry, guards, pending, ended=None)
            pending = None
            if pauses.act(step + 1, step // per_epoch):
                break
    if pending is not None:
        _record(progress, telemetry, guards, pending, ended=None)


def evaluate(backend: Backend, session: Any, rows: TokenRows, batch_size: int) -> float:
    """Mean cross-entropy over all supervised tokens of the rows, in nats."""
    starts = range(0, len(rows), batch_size)
    sums = [backend.loss(session, pack(rows[start : start + batch_size])) for start in starts]
    return sum(total for total, _ in sums) / sum(count for _, count in sums)


def _windows(
    rows: TokenRows, batching: Batching, first: int, total: int, per_epoch: int
) -> Iterator[tuple[int, list[Batch]]]:
    """Every step from ``first`` on, and its window."""
    step = first
    while step < total:
        for window in batching.windows(rows, step // per_epoch, step % per_epoch):
            if step == total:
                return
            yield step, window
            step += 1


@attrs.frozen(kw_only=True)
class _Pending:
    """A step that has been handed to the device and not been read yet."""

    place: dict[str, Any]
    window: Sequence[Batch]
    metrics: StepMetrics
    started: float


def _record(
    progress: Progress, telemetry: Telemetry, guards: StepGuards, step: _Pending, *, ended: float | None
) -> None:
    """Read a step's metrics; it lasted until the next one began, or where none followed at once, until it was read."""
    loss = float(step.metrics.loss_sum) / step.metrics.supervised_tokens
    grad_norm = float(step.metrics.grad_norm)
    skipped = guards.skips(step.place["step"], loss, grad_norm)
    seconds = (time.perf_counter() if ended is None else ended) - step.started
    tokens = sum(len(batch.input_ids) for batch in step.window)
    progress.losses.append(math.nan if skipped else loss)
    progress.step_seconds.append(seconds)
    progress.seconds += seconds
    progress.tokens += tokens
    if skipped:
        finite = {"loss_is_finite": math.isfinite(loss), "grad_norm_is_finite": math.isfinite(grad_norm)}
        telemetry.emit("window_skipped", {"epoch": step.place["epoch"], "step": step.place["step"], **finite})
        return
    progress.zero_gradients += grad_norm == 0
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
    guards.told()
