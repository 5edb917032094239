"""A run in Weights & Biases: its settings and its numbers, nothing else of the machine.

Where it goes is W&B's own affair: ``wandb login``, ``WANDB_MODE=offline``, ``WANDB_PROJECT`` and the other variables
work as everywhere. Files lie under ``RUN/wandb``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

# Loaded only where --report-to asks for it.
import wandb

from mens_core.observers.scalars import ScalarObserver

__all__ = ["WeightsAndBiases"]


class WeightsAndBiases(ScalarObserver):
    """Logs to a W&B run of its own."""

    def begin(self) -> None:
        """Begin a W&B run."""
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "mens-core"),
            dir=self.folder,
            name=os.environ.get("WANDB_NAME", self.folder.name),
            config=self.settings,
            # What was not asked for stays here: printed text, code, the repository's state, the machine's load.
            settings=wandb.Settings(
                console="off",
                disable_code=True,
                disable_git=True,
                x_disable_machine_info=True,
                x_save_requirements=False,
            ),
        )

    def write(self, step: int, _ts_ms: int, numbers: Mapping[str, float]) -> None:
        """Log a step."""
        self._run.log(dict(numbers), step=step)

    def end(self, ending: str) -> None:
        """End the W&B run, as a success if the run was one."""
        self._run.finish(exit_code=0 if ending == "train_complete" else 1)
