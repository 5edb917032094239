"""A run on the terminal while it goes on, told by its telemetry events.

On a terminal it is a bar with the loss and where it is heading, tokens a second, memory beside the plan's and the time
left; in a pipe, plain lines, at most one every few seconds, the first and the last step always.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from mens_core.errors import harmless
from mens_core.report import duration, memory_beside_plan, say, trend
from mens_core.sizes import written_size

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

__all__ = ["TrainingView"]

_SECONDS_BETWEEN_LINES = 5.0


class TrainingView:
    """Shows a run while it goes on; ``observe`` takes its telemetry events."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._last_line = 0.0
        self._planned_memory: int | None = None
        self._losses: list[float] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def observe(self, event: Mapping[str, Any]) -> None:
        """Show one event."""
        payload = event["payload"]
        match event["event"]:
            case "rows_read":
                self._rows_read(payload)
            case "train_start":
                self._start(payload)
            case "train_resume":
                self._resume(payload)
            case "evaluation":
                self._line(f"held-out loss {payload['eval_loss']:.4f} after {payload['step']} steps")
            case "step":
                self._step(payload)
            case "window_skipped":
                self._line(f"warning: the window of step {payload['step']} was skipped, for it gave no finite number")
            case "guard" if payload["severity"] == "warning":
                self._line(f"warning: {payload['code']}: {payload['message']}")
            case "checkpoint_saved":
                size, seconds = written_size(payload["bytes"]), payload["seconds"]
                self._line(f"checkpoint of step {payload['step']}: {size} in {seconds:.2g} s")

    def _start(self, payload: Mapping[str, Any]) -> None:
        self._line(
            f"{payload['execution_kernel']} on {payload['compute_device']} in {payload['dtype']}: "
            f"{payload['base_model']}, {payload['rows']:,} rows, {payload['tokens']:,} tokens "
            f"({payload['supervised_tokens'] / payload['tokens']:.0%} supervised), "
            f"{payload['planned_steps_total']:,} steps"
        )
        seconds, self._planned_memory = payload["estimate"]["train_seconds"], payload["estimate"]["peak_memory_bytes"]
        if seconds is not None and self._planned_memory is not None:
            self._line(f"planned: {written_size(self._planned_memory)} of memory, {duration(seconds)} of training")
        for warning in payload["warnings"]:
            self._line(f"warning: {warning}")
        if sys.stdout.isatty() and self._progress is None:
            self._progress = _bar()
            self._task = self._progress.add_task("training", total=payload["planned_steps_total"], figures="")
            self._progress.start()

    def _resume(self, payload: Mapping[str, Any]) -> None:
        for damaged in payload["passed_over"]:
            self._line(f"warning: passed over a damaged checkpoint, {damaged}")
        self._line(f"going on from step {payload['step']}" if payload["path"] else "beginning anew")
        for note in payload["notes"]:
            self._line(f"note: {note}")

    def _rows_read(self, payload: Mapping[str, Any]) -> None:
        if time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self._line(f"{payload['rows']:,} rows read")

    def _step(self, payload: Mapping[str, Any]) -> None:
        self._losses.append(payload["loss"])
        loss = f"loss {payload['loss']:.4f} {trend(self._losses)}"
        memory = memory_beside_plan(payload["peak_memory_bytes"], self._planned_memory)
        figures = f"{loss}  {payload['tokens_per_sec']:,.0f} tokens/s  {memory}"
        left = f"{duration(payload['eta_seconds'])} left"
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=payload["step"], figures=f"{figures}  {left}")
            return
        ends = payload["step"] in {1, payload["total_steps"]}
        if ends or time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            place = f"step {payload['step']}/{payload['total_steps']}"
            self._line(f"{place}  {figures}  lr {payload['lr']:.2e}  {left}")

    def _line(self, text: str) -> None:
        if self._progress is not None:
            self._progress.console.print(harmless(text), highlight=False, markup=False)
        else:
            say(text)


def _bar() -> Progress:
    # heavy: a third of a second that only a run on a terminal needs
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn  # noqa: PLC0415

    # Fits 80 columns.
    return Progress(MofNCompleteColumn(), BarColumn(bar_width=10), TextColumn("{task.fields[figures]}"))
