"""telemetry.jsonl read back, whole or while it grows.

Reading is strict: a line that is no event is an error that names it. One thing is allowed, the last line may lack its
end: the run is writing it, or was killed while it did.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs

from mens_core.errors import DataError
from mens_core.hf.files import find_file, parse_json, regular_size
from mens_core.training.telemetry_schema import find_problem

__all__ = ["TELEMETRY", "TelemetryLog", "TelemetryTail", "read_telemetry"]

TELEMETRY = "telemetry.jsonl"

# A line with a thousand warnings has a tenth of this.
_LONGEST_LINE = 1_000_000


@attrs.frozen
class TelemetryLog:
    """The events of a run.

    Attributes:
        events: in order, each with ``ts_ms``, ``event`` and ``payload``, as the shipped schema has it.
        torn: whether half a line follows them.
    """

    events: tuple[dict[str, Any], ...]
    torn: bool

    def last(self, event: str) -> dict[str, Any] | None:
        """The payload of the last event of a name; None if there is none."""
        return next((found["payload"] for found in reversed(self.events) if found["event"] == event), None)

    def payloads(self, event: str) -> list[dict[str, Any]]:
        """The payloads of all events of a name, in order."""
        return [found["payload"] for found in self.events if found["event"] == event]


class TelemetryTail:
    """Reads what a run's telemetry has gained since it was last asked.

    Args:
        folder: of the run; it need not be there yet.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._offset, self._lines = folder, 0, 0
        #: Whether half a line stands at the end.
        self.torn = False

    def read(self) -> list[dict[str, Any]]:
        """The whole lines that are new, each an event.

        Raises:
            DataError: if a line is no event of the shipped schema.
            ModelError: if the file is none, or a link that leads out of the folder.
        """
        path = find_file(self._folder, TELEMETRY)
        if path is None:
            return []
        regular_size(path)
        events = []
        with path.open("rb") as file:
            file.seek(self._offset)
            while (line := file.readline(_LONGEST_LINE + 1)).endswith(b"\n"):
                self._offset, self._lines = self._offset + len(line), self._lines + 1
                events.append(_event(line, path, self._lines))
        if len(line) > _LONGEST_LINE:
            raise _refused(f"it is longer than {_LONGEST_LINE:,} bytes", path, self._lines + 1)
        self.torn = bool(line)
        return events


def read_telemetry(folder: Path) -> TelemetryLog:
    """Read the telemetry of a run's folder; none is as good as an empty one, since a run begins without.

    Raises:
        DataError, ModelError: as ``TelemetryTail.read`` does.
    """
    tail = TelemetryTail(folder)
    events = tail.read()
    return TelemetryLog(tuple(events), torn=tail.torn)


def _event(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        event = parse_json(line)
    except ValueError as error:
        raise _refused(str(error), path, number) from error
    problem = find_problem(event)
    if problem is not None:
        raise _refused(problem, path, number)
    assert isinstance(event, dict), "the schema says so"
    return event


def _refused(problem: str, path: Path, number: int) -> DataError:
    return DataError(
        f"a line of the telemetry is no event: {problem}",
        where=f"{path}, line {number}",
        expected="events as docs/telemetry.md describes them",
    )
