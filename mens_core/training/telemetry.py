"""telemetry.jsonl: one event a line, on disk before anyone else hears of it.

    {"ts_ms": 1764000000000, "event": "step", "payload": {...}}

Events and their fields are in ``telemetry_schema.json`` beside this module. A run that ends says how:
``train_complete``, ``train_interrupted`` or ``train_stopped`` is its last line; one that was killed has none of them.
Local only; nothing leaves the machine.

The lines are in the order of the events, whatever the clock says. A run that goes on takes back what was told of the
steps after its checkpoint, since they are taken again: every step is in the file once.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mens_core.atomic import replacing
from mens_core.errors import TrainingError

__all__ = ["ENDINGS", "TELEMETRY_SCHEMA", "Observer", "Telemetry", "rewind", "told_losses"]

TELEMETRY_SCHEMA = 1

#: Events that are a run's last one.
ENDINGS = ("train_complete", "train_interrupted", "train_stopped")

# What a run that goes on tells again.
_OF_A_STEP = {"step", "window_skipped", "evaluation", "checkpoint_saved"}

Observer = Callable[[Mapping[str, Any]], None]


class Telemetry:
    """Writes events and passes each on to the observers, in that order.

    Leaving the block with an error writes ``train_stopped``, unless the run has said already how it ended, or the
    file is what failed.

    Args:
        path: of telemetry.jsonl; events are appended.
        observers: called with every event; an exception of theirs ends the run.

    Raises:
        TrainingError: if the file cannot be opened.
    """

    def __init__(self, path: Path, observers: Sequence[Observer]) -> None:
        self._path, self._observers = path, observers
        self._last, self._step, self._broken = "", 0, False
        try:
            # Without a buffer: what was written is with the system, and closing has nothing left to fail at.
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise self._refused(error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is not None and not self._broken and self._last not in ENDINGS:
                self.emit("train_stopped", {"step": self._step, "error": f"{type(error).__name__}: {error}"})
        finally:
            self._file.close()

    def emit(self, event: str, payload: Mapping[str, Any]) -> None:
        """Write one event.

        Raises:
            TrainingError: if the file system refuses it, or the payload holds NaN or infinity, which are no JSON.
        """
        record = {"ts_ms": time.time_ns() // 1_000_000, "event": event, "payload": dict(payload)}
        try:
            self._write(json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        except (OSError, ValueError) as error:
            self._broken = True
            raise self._refused(error) from error
        self._last, self._step = event, payload.get("step", self._step)
        for observe in self._observers:
            try:
                observe(record)
            except BaseException:
                # It has ended the run, and is not told so.
                self._observers = [other for other in self._observers if other is not observe]
                raise

    def _write(self, line: bytes) -> None:
        while line:
            line = line[self._file.write(line) :]

    def _refused(self, error: OSError | ValueError) -> TrainingError:
        reason = error.strerror if isinstance(error, OSError) else error
        return TrainingError(
            f"telemetry cannot be written, and a run whose record has holes is stopped: {reason}",
            where=self._path,
            fix="make room, or choose another --output-dir" if isinstance(error, OSError) else None,
        )


def rewind(path: Path, step: int) -> int:
    """Take back what was told of later steps, and the part of a line that a process left when it was killed.

    What else was told stays: that the run was started, went on, was interrupted.

    Args:
        path: of telemetry.jsonl; nothing is done if it is not there.
        step: after which the run goes on.

    Returns:
        How many lines were taken back.

    Raises:
        OSError: as the file system reports it; the file is then as it was.
    """
    if not path.exists():
        return 0
    taken = 0
    with path.open("rb") as lines, replacing(path, binary=True) as (kept,):
        for line in lines:
            if _stays(line, step):
                kept.write(line)
            else:
                taken += 1
    return taken


def told_losses(path: Path) -> tuple[float, ...]:
    """The loss of every window in a run's telemetry, NaN where it was skipped.

    Raises:
        OSError: if it cannot be read.
    """
    with path.open(encoding="utf-8") as lines:
        events = (json.loads(line) for line in lines)
        return tuple(
            event["payload"].get("loss", math.nan) for event in events if event["event"] in {"step", "window_skipped"}
        )


def _stays(line: bytes, step: int) -> bool:
    try:
        event = json.loads(line)
    except ValueError:
        return False
    return line.endswith(b"\n") and not (event["event"] in _OF_A_STEP and event["payload"]["step"] > step)
