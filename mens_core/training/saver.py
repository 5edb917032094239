"""Checkpoints written aside of the loop: it hands over a copy and goes on."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import attrs

from mens_core.artifacts.checkpoints import Checkpoint, checkpoint_name, keep_only, write_checkpoint
from mens_core.training.telemetry import Telemetry

__all__ = ["Saver"]


@attrs.frozen
class _Saved:
    step: int
    epoch: int
    seconds: float
    size: int


class Saver:
    """Writes checkpoints in a thread of its own, one at a time, and removes those that are not kept.

    What goes wrong there is raised in the loop, by the next call.

    Args:
        home: ``checkpoints/``.
        keep: how many of the newest stay.
        telemetry: hears of every checkpoint, from the loop's thread.
        saved: steps of the checkpoints that are there and whole; others are removed with the first that is saved.
    """

    def __init__(self, home: Path, keep: int, telemetry: Telemetry, saved: list[int]) -> None:
        self.home = home
        self._keep = keep
        self._telemetry = telemetry
        self._saved = sorted(saved)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._writing: Future[_Saved] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=True)
        failure = self._writing.exception() if self._writing is not None else None
        if failure is None:
            return
        if error is None:
            raise failure
        error.add_note(f"a checkpoint could not be written either: {failure}")

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step lies."""
        return self.home / checkpoint_name(step)

    def save(self, checkpoint: Checkpoint, best: int | None) -> None:
        """Begin to write; waits for the one before.

        Args:
            checkpoint: what is to be written.
            best: a step whose checkpoint is kept, however old it is.

        Raises:
            OSError: if the one before could not be written.
        """
        self.finish()
        self._saved = [step for step in self._saved if step < checkpoint.step] + [checkpoint.step]
        self._saved = sorted({*self._saved[-self._keep :], *([best] if best in self._saved else [])})
        self._writing = self._thread.submit(self._write, checkpoint, list(self._saved))

    def poll(self) -> None:
        """Tell of a checkpoint that has been written since.

        Raises:
            OSError: if it could not be.
        """
        if self._writing is not None and self._writing.done():
            self.finish()

    def finish(self) -> None:
        """Wait for the one that is being written.

        Raises:
            OSError: if it could not be.
        """
        if self._writing is None:
            return
        writing, self._writing = self._writing, None
        saved = writing.result()
        self._telemetry.emit(
            "checkpoint_saved",
            {
                "step": saved.step,
                "epoch": saved.epoch,
                "path": str(self.path(saved.step)),
                "seconds": saved.seconds,
                "bytes": saved.size,
            },
        )

    def _write(self, checkpoint: Checkpoint, keep: list[int]) -> _Saved:
        started = time.perf_counter()
        record: dict[str, Any] = dict(checkpoint.record)
        size = write_checkpoint(self.home, checkpoint.state, record, checkpoint.curve)
        keep_only(self.home, keep)
        return _Saved(checkpoint.step, record["epoch"], time.perf_counter() - started, size)
