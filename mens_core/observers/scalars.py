"""What the observers of numbers share: which numbers of which events, and when a record of them begins and ends."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mens_core.hookspecs import hookimpl
from mens_core.plan import ExecutionPlan
from mens_core.training.telemetry import ENDINGS

__all__ = ["ScalarObserver", "scalars"]

#: Event → field → the name under which it is shown; users of transformers' Trainer know them.
_SHOWN = {
    "step": {
        "loss": "train/loss",
        "lr": "train/learning_rate",
        "grad_norm": "train/grad_norm",
        "epoch": "train/epoch",
        "supervised_ratio": "train/supervised_ratio",
        "tokens_per_sec": "train/tokens_per_sec",
        "step_seconds": "train/step_seconds",
        "peak_memory_bytes": "train/peak_memory_bytes",
    },
    "evaluation": {"eval_loss": "eval/loss"},
}


def scalars(event: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of an event by the names under which they are shown; none for most events."""
    payload = event["payload"]
    return {shown: float(payload[field]) for field, shown in _SHOWN.get(event["event"], {}).items()}


class ScalarObserver(abc.ABC):
    """Shows a run's numbers somewhere; a record is begun by the first event and ended by the last.

    Args:
        plan: of the run.
    """

    def __init__(self, plan: ExecutionPlan) -> None:
        assert plan.contract.output.output_dir is not None, "a plan to train has an output folder"
        self.folder: Path = plan.contract.output.output_dir
        #: What was asked for and decided, as texts.
        self.settings = {
            name: str(value)
            for name, value in {
                **plan.contract.as_fields(),
                "execution_kernel": plan.execution_kernel,
                "contract_digest": plan.contract_digest,
            }.items()
            if value is not None
        }
        self._begun = False

    @hookimpl
    def mens_event(self, event: Mapping[str, Any]) -> None:
        """Pass an event's numbers on."""
        if not self._begun:
            self._begun = True
            self.begin()
        numbers = scalars(event)
        if numbers:
            self.write(event["payload"]["step"], event["ts_ms"], numbers)
        if event["event"] in ENDINGS:
            self.end(event["event"])

    @abc.abstractmethod
    def begin(self) -> None:
        """Begin a record; the run's folder is there."""

    @abc.abstractmethod
    def write(self, step: int, ts_ms: int, numbers: Mapping[str, float]) -> None:
        """Record numbers of a step, so that they are there if the process is killed the next moment."""

    @abc.abstractmethod
    def end(self, ending: str) -> None:
        """End the record; ``ending`` is one of ``ENDINGS``."""
