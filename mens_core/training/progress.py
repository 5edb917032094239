"""How far a run has come: the figures of every step, and the held-out losses."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from mens_core.artifacts.checkpoints import Checkpoint

__all__ = ["Best", "Progress", "perplexity"]


@attrs.frozen
class Best:
    """The lowest held-out loss so far.

    Attributes:
        step: after which it was measured, at least 1.
        loss: in nats a supervised token.
        since: how many were measured after it.
    """

    step: int
    loss: float
    since: int


@attrs.define(kw_only=True)
class Progress:
    """What a loop leaves, and what it goes on from.

    Attributes:
        losses: mean loss of each window, in nats per supervised token; NaN where the window was skipped.
        step_seconds: of each window.
        tokens: all tokens that went through the model.
        supervised_tokens: those of them that were trained on.
        seconds: of all steps.
        zero_gradients: steps whose gradient was exactly zero.
        evaluations: step → held-out loss after it; that of step 0 is the start's.
        wall_seconds: of the processes before this one.
        peak_memory_bytes: highest resident size of the processes before this one.
    """

    losses: list[float] = attrs.field(factory=list)
    step_seconds: list[float] = attrs.field(factory=list)
    tokens: int = 0
    supervised_tokens: int = 0
    seconds: float = 0.0
    zero_gradients: int = 0
    evaluations: dict[int, float] = attrs.field(factory=dict)
    wall_seconds: float = 0.0
    peak_memory_bytes: int = 0

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Progress:
        """As it was when the checkpoint was saved."""
        saved = checkpoint.record["progress"]
        return cls(
            losses=checkpoint.curve["losses"].tolist(),
            step_seconds=checkpoint.curve["step_seconds"].tolist(),
            tokens=saved["tokens"],
            supervised_tokens=saved["supervised_tokens"],
            seconds=saved["seconds"],
            zero_gradients=saved["zero_gradients"],
            evaluations={int(step): float(loss) for step, loss in saved["evaluations"]},
            wall_seconds=saved["wall_seconds"],
            peak_memory_bytes=saved["peak_memory_bytes"],
        )

    @property
    def steps(self) -> int:
        """Windows that are done, skipped ones among them; this is where the run stands in its data."""
        return len(self.losses)

    @property
    def steps_taken(self) -> int:
        """Optimizer steps: windows that were not skipped."""
        return len(self._known)

    @property
    def _known(self) -> list[float]:
        return [loss for loss in self.losses if not math.isnan(loss)]

    def record(self, *, wall_seconds: float, peak_memory_bytes: int) -> dict[str, Any]:
        """For state.json; the arguments are this process's own."""
        return {
            "tokens": self.tokens,
            "supervised_tokens": self.supervised_tokens,
            "seconds": self.seconds,
            "zero_gradients": self.zero_gradients,
            "evaluations": [[step, loss] for step, loss in self.evaluations.items()],
            "wall_seconds": self.wall_seconds + wall_seconds,
            "peak_memory_bytes": max(self.peak_memory_bytes, peak_memory_bytes),
        }

    def curve(self) -> Mapping[str, NDArray[np.float64]]:
        """For a checkpoint: ``losses`` and ``step_seconds``."""
        return {"losses": np.array(self.losses), "step_seconds": np.array(self.step_seconds)}

    def best(self, min_delta: float = 0.0) -> Best | None:
        """The lowest held-out loss of a trained adapter; None if none was measured.

        Args:
            min_delta: a loss counts as lower if it is lower by more than this, in nats.
        """
        found: Best | None = None
        for step, loss in self.evaluations.items():
            if step == 0:
                continue
            better = found is None or loss < found.loss - min_delta
            found = Best(step, loss, 0) if found is None or better else attrs.evolve(found, since=found.since + 1)
        return found

    def summary(self) -> dict[str, Any]:
        """The loop's part of the manifest's results; first and last loss are means of a tenth of the steps."""
        losses = self._known
        tenth = max(1, len(losses) // 10)
        return {
            "optimizer_steps": len(losses),
            "windows_skipped": len(self.losses) - len(losses),
            "first_loss": sum(losses[:tenth]) / tenth,
            "last_loss": sum(losses[-tenth:]) / tenth,
            "tokens_trained": self.tokens,
            "supervised_tokens_trained": self.supervised_tokens,
            "train_seconds": self.seconds,
            "median_step_seconds": statistics.median(self.step_seconds),
            "tokens_per_sec": self.tokens / self.seconds,
        }


def perplexity(loss: float) -> float | None:
    """The exponential of a loss in nats a token; None where that is no number of 64 bits."""
    return math.exp(loss) if loss < 700 else None
