"""A run in TensorBoard: event files in its folder, ``tensorboard --logdir RUN`` shows them. No framework is needed."""

from __future__ import annotations

from collections.abc import Mapping

# Loaded only where --report-to asks for it.
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from mens_core.observers.scalars import ScalarObserver

__all__ = ["TensorBoard"]


class TensorBoard(ScalarObserver):
    """Writes ``RUN/tensorboard/``; a run that goes on adds a file, which TensorBoard joins to the ones before."""

    def begin(self) -> None:
        """Begin an event file."""
        self._writer = EventFileWriter(str(self.folder / "tensorboard"))
        self._empty = True

    def write(self, step: int, ts_ms: int, numbers: Mapping[str, float]) -> None:
        """Write and flush."""
        if self._empty:
            # What older files say of later steps is not of this run: it went on from before them, or began anew.
            start = SessionLog(status=SessionLog.START)
            self._writer.add_event(Event(wall_time=ts_ms / 1000, step=step, session_log=start))
            self._empty = False
        values = [Summary.Value(tag=name, simple_value=number) for name, number in numbers.items()]
        self._writer.add_event(Event(wall_time=ts_ms / 1000, step=step, summary=Summary(value=values)))
        self._writer.flush()

    def end(self, _ending: str) -> None:
        """Close the file."""
        self._writer.close()
