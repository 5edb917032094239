"""What happens between two steps: held-out losses, checkpoints, early stopping, and an end that was asked for."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs

from mens_core.artifacts.checkpoints import Checkpoint
from mens_core.backend import Backend
from mens_core.contract import FineTuneContract
from mens_core.errors import RunInterrupted
from mens_core.text.tokens import TokenRows
from mens_core.training.loop import evaluate
from mens_core.training.memory import peak_memory_bytes
from mens_core.training.progress import Progress, perplexity
from mens_core.training.saver import Saver
from mens_core.training.telemetry import Telemetry

__all__ = ["BetweenSteps", "Stop"]

Stop = Callable[[], str | None]
"""Asked after every step, and a first time before the first one, to let it know that the run listens; a text that it
returns then or later, such as the name of a signal, ends the run in order after the step."""


@attrs.define(kw_only=True)
class BetweenSteps:
    """Decides after every step what is to be done, and does it.

    All of it follows from the contract, the step and the held-out losses, so that a run that goes on does what it
    would have done; but for ``stop`` and ``max_time``, which leave a checkpoint at whatever step it is.

    Attributes:
        backend: that trains.
        session: its own object.
        contract: of the run.
        held_out: rows for the held-out loss; None if there are none.
        progress: what the loop fills.
        telemetry: of the run.
        saver: of its checkpoints.
        stop: whether the run is told to stop.
        total: steps of the whole run.
        per_epoch: steps of an epoch.
        began: when this process began the run, on the monotonic clock.
        origin: what state.json says beside the progress.
    """

    backend: Backend
    session: Any
    contract: FineTuneContract
    held_out: TokenRows | None
    progress: Progress
    telemetry: Telemetry
    saver: Saver
    stop: Stop
    total: int
    per_epoch: int
    began: float
    origin: Mapping[str, Any]
    _reason: str | None = attrs.field(default=None, init=False)

    def due(self, step: int) -> bool:
        """See ``loop.Pauses``."""
        self.saver.poll()
        self._reason = self.stop() or self._out_of_time()
        return self._reason is not None or self._evaluates(step) or self._saves(step)

    def act(self, step: int, epoch: int) -> bool:
        """See ``loop.Pauses``.

        Raises:
            RunInterrupted: if the run was told to stop before its end, when its checkpoint is on the disk.
        """
        ends = step == self.total
        improved = False
        if self._evaluates(step):
            self.measure(step)
            ends |= self.stops_early()
            improved = self._best_step() == step
        stopped = self._reason is not None and not ends
        periodic = self.contract.checkpoint.checkpoint_every > 0 and (ends or self._saves(step))
        # The best is needed at the end where early stopping takes it, and kept where there may be a better one.
        if stopped or periodic or (improved and self.contract.training.eval_every is not None):
            self._save(step, epoch)
        if stopped:
            self.saver.finish()
            raise RunInterrupted(str(self._reason), step=step, checkpoint=self.saver.path(step))
        return ends

    def measure(self, step: int) -> None:
        """Measure the held-out loss and tell of it; nothing without held-out rows."""
        if self.held_out is None:
            return
        loss = evaluate(self.backend, self.session, self.held_out, self.contract.training.batch_size)
        self.progress.evaluations[step] = loss
        self.telemetry.emit("evaluation", {"step": step, "eval_loss": loss, "eval_perplexity": perplexity(loss)})

    def stops_early(self) -> bool:
        """Whether the held-out loss has not fallen for as long as the contract waits."""
        spec = self.contract.training
        best = self.progress.best(spec.early_stopping_min_delta)
        return (
            spec.early_stopping_patience is not None
            and best is not None
            and (best.since >= spec.early_stopping_patience)
        )

    def best_path(self) -> Path | None:
        """The checkpoint of the lowest held-out loss; None if none is kept."""
        best = self._best_step()
        path = None if best is None else self.saver.path(best)
        return path if path is not None and path.is_dir() else None

    def _best_step(self) -> int | None:
        best = self.progress.best(self.contract.training.early_stopping_min_delta)
        return None if best is None else best.step

    def _evaluates(self, step: int) -> bool:
        every = self.contract.training.eval_every
        return self.held_out is not None and (step == self.total or (every is not None and step % every == 0))

    def _saves(self, step: int) -> bool:
        every = self.contract.checkpoint.checkpoint_every
        return every > 0 and (step % every == 0 or step % self.per_epoch == 0 or step == self.total)

    def _out_of_time(self) -> str | None:
        limit = self.contract.checkpoint.max_time
        return "max_time" if limit is not None and time.monotonic() - self.began >= limit else None

    def _save(self, step: int, epoch: int) -> None:
        progress = self.progress.record(
            wall_seconds=time.monotonic() - self.began, peak_memory_bytes=peak_memory_bytes()
        )
        best = self.progress.best(self.contract.training.early_stopping_min_delta)
        record = {
            "epoch": epoch,
            "next_epoch": step // self.per_epoch,
            "next_window": step % self.per_epoch,
            "seed": self.contract.training.seed,
            "best": None if best is None else {"step": best.step, "eval_loss": best.loss},
            "progress": progress,
            **self.origin,
        }
        # Whose copy would stand beside the next one.
        self.saver.finish()
        checkpoint = Checkpoint(
            path=self.saver.path(step),
            state=self.backend.state(self.session),
            record=record,
            curve=self.progress.curve(),
        )
        self.saver.save(checkpoint, None if best is None else best.step)
