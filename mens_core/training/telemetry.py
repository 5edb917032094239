"""telemetry.jsonl: one event a line, on disk before anyone else hears of it.

    {"ts_ms": 1764000000000, "event": "step", "payload": {...}}

Events: ``train_start``, ``train_resume``, ``evaluation``, ``step``, ``checkpoint_saved``, ``train_interrupted``,
``train_complete``. Local only; nothing leaves the machine.

The lines are in the order of the events, whatever the clock says. A run that goes on takes back what was told of the
steps after its checkpoint, since they are taken again: every step is in the file once.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mens_core.atomic import replacing

__all__ = ["TELEMETRY_SCHEMA", "Observer", "Telemetry", "rewind", "told_losses"]

TELEMETRY_SCHEMA = 1

# What a run that goes on tells again.
_OF_A_STEP = {"step", "evaluation", "checkpoint_saved"}

Observer = Callable[[Mapping[str, Any]], None]


class Telemetry:
    """Writes events and passes each on to the observers, in that order.

    Args:
        path: of telemetry.jsonl.
        observers: called with every event; an exception of theirs ends the run.
    """

    def __init__(self, path: Path, observers: Sequence[Observer]) -> None:
        self._file = path.open("a", encoding="utf-8")
        self._observers = observers

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def emit(self, event: str, payload: Mapping[str, Any]) -> None:
        """Write one event.

        Raises:
            ValueError: if the payload holds NaN or infinity, which are no JSON.
            OSError: if the disk refuses it.
        """
        record = {"ts_ms": time.time_ns() // 1_000_000, "event": event, "payload": dict(payload)}
        self._file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()
        for observe in self._observers:
            observe(record)


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
    """The loss of every step in a run's telemetry.

    Raises:
        OSError: if it cannot be read.
    """
    with path.open(encoding="utf-8") as lines:
        events = (json.loads(line) for line in lines)
        return tuple(event["payload"]["loss"] for event in events if event["event"] == "step")


def _stays(line: bytes, step: int) -> bool:
    try:
        event = json.loads(line)
    except ValueError:
        return False
    return line.endswith(b"\n") and not (event["event"] in _OF_A_STEP and event["payload"]["step"] > step)
