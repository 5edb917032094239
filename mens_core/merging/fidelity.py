"""Whether a merged model says what base and adapter say together, measured on rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from mens_core.exchange import IGNORE, Batch, BatchShape
from mens_core.inference import OpenModel
from mens_core.text.pack import pack

__all__ = ["compare"]

# Each position costs two forward passes and two rows of logits; this many tell enough.
_MOST_TOKENS = 4096


@attrs.define
class _Sums:
    """Over the positions seen so far."""

    positions: int = 0
    supervised: int = 0
    largest: float = 0.0
    differences: float = 0.0
    divergence: float = 0.0
    agreeing: int = 0
    losses: NDArray[np.float64] = attrs.field(factory=lambda: np.zeros(2))

    def add(self, batch: Batch, adapted: NDArray[np.float32], merged: NDArray[np.float32]) -> None:
        expected, found = (_log_softmax(logits) for logits in (adapted, merged))
        difference = np.abs(merged - adapted)
        self.positions += len(batch.input_ids)
        self.largest = max(self.largest, float(difference.max()))
        self.differences += float(difference.mean(axis=1).sum())
        self.divergence += float((np.exp(expected) * (expected - found)).sum())
        self.agreeing += int((adapted.argmax(axis=1) == merged.argmax(axis=1)).sum())
        places = np.flatnonzero(batch.targets != IGNORE)
        self.supervised += len(places)
        targets = batch.targets[places]
        self.losses -= [float(logits[places, targets].sum()) for logits in (expected, found)]


def compare(adapted: OpenModel, merged: OpenModel, data: Path) -> dict[str, Any]:
    """Run both over the first rows of a file.

    Args:
        adapted: the base with the adapter.
        merged: the merged model.
        data: a file of rows, of which some 4 000 tokens are taken.

    Returns:
        Largest and mean difference of logits, the mean divergence KL(adapted ‖ merged) in nats, the share of positions
        at which both expect the same token, and both losses in nats a supervised token.

    Raises:
        MensError: if the rows cannot be read, or a backend cannot open a model.
    """
    rows = adapted.rows(data)
    chosen = rows[: max(1, int(np.searchsorted(np.cumsum(rows.lengths), _MOST_TOKENS, side="right")))]
    longest = int(chosen.lengths.max())
    shape = BatchShape(rows=1, tokens=longest, longest_row=longest, supervised=longest, batches=1)
    sessions = adapted.session(shape), merged.session(shape)
    sums = _Sums()
    for place in range(len(chosen)):
        batch = pack(chosen[place : place + 1])
        sums.add(batch, adapted.backend.forward(sessions[0], batch), merged.backend.forward(sessions[1], batch))
    losses = sums.losses / max(sums.supervised, 1)
    return {
        "data": str(data),
        "rows": len(chosen),
        "positions": sums.positions,
        "max_logit_difference": sums.largest,
        "mean_logit_difference": sums.differences / sums.positions,
        "mean_divergence": sums.divergence / sums.positions,
        "top1_agreement": sums.agreeing / sums.positions,
        "loss_adapted": float(losses[0]),
        "loss_merged": float(losses[1]),
    }


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))
