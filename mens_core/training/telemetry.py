"""telemetry.jsonl: one event a line, on disk before anyone else hears of it.

    {"ts_ms": 1764000000000, "event": "step", "payload": {...}}

Events: ``train_start``, ``step``, ``train_complete``, ``train_stopped``. Local only; nothing leaves the machine.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

__all__ = ["TELEMETRY_SCHEMA", "Observer", "Telemetry"]

TELEMETRY_SCHEMA = 1

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
