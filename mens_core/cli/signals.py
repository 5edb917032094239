"""Signals that end a command: at once where nothing is lost by it, and in order where there is a step to finish."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self

__all__ = ["EXIT_CODES", "Signals", "raise_at_once"]

EXIT_CODES = {"SIGINT": 130, "SIGTERM": 143, "max_time": 124}
"""Why a command ended before its end → its exit code: 128 and the signal's number, and that of timeout(1)."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def raise_at_once(number: int, _frame: FrameType | None) -> NoReturn:
    """Handle a signal by ``KeyboardInterrupt`` with its name."""
    raise KeyboardInterrupt(signal.Signals(number).name)


class Signals:
    """While a run goes on: the first signal ends it after its step, a second one at once, a third by the system.

    Before the loop asks for the first time there is no step to finish, and the first signal ends it at once.
    """

    def __init__(self) -> None:
        self._heard: str | None = None
        self._asked = False
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._former = {number: signal.signal(number, self._hear) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def stop(self) -> str | None:
        """The name of the signal that was heard; None if none was."""
        self._asked = True
        return self._heard

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self._asked and self._heard is None:
            self._heard = signal.Signals(number).name
            return
        signal.signal(number, signal.SIG_DFL)
        raise_at_once(number, frame)
