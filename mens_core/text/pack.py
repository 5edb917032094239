"""Token rows → packed batches → accumulation windows, in an order that only the seed decides.

    rows, shuffled per epoch ──▶ batch: batch_size rows end to end ──▶ window: grad_accum batches ──▶ one step

Nothing is padded: a batch holds exactly its rows' tokens. The last window of an epoch may hold fewer batches
and its last batch fewer rows; it is stepped by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from mens_core.exchange import IGNORE, Batch, BatchShape
from mens_core.sections import TrainingSpec
from mens_core.text.encode import TokenRow

__all__ = ["batches", "epoch_order", "pack", "run_shape", "steps_per_epoch", "total_steps", "windows"]


def pack(rows: Sequence[TokenRow]) -> Batch:
    """Lay rows end to end and shift the targets by one inside each row.

    Raises:
        ValueError: if there is no row.
    """
    targets = []
    for row in rows:
        shifted = np.full(len(row.input_ids), IGNORE, np.int32)
        shifted[:-1] = np.where(row.supervised[1:], row.input_ids[1:], IGNORE)
        targets.append(shifted)
    return Batch(
        input_ids=np.concatenate([row.input_ids for row in rows]),
        positions=np.concatenate([np.arange(len(row.input_ids), dtype=np.int32) for row in rows]),
        targets=np.concatenate(targets),
        row_lengths=np.asarray([len(row.input_ids) for row in rows], np.int32),
    )


def batches(rows: Sequence[TokenRow], batch_size: int) -> Iterator[Batch]:
    """Pack the rows in the order given, ``batch_size`` at a time."""
    for start in range(0, len(rows), batch_size):
        yield pack(rows[start : start + batch_size])


def epoch_order(num_rows: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """The permutation of one epoch; a function of its arguments alone (Philox, keyed by seed and epoch)."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(num_rows)


def windows(
    rows: Sequence[TokenRow], *, batch_size: int, grad_accum: int, seed: int, epoch: int
) -> Iterator[list[Batch]]:
    """One epoch's accumulation windows, each a list of 1 to ``grad_accum`` batches."""
    shuffled = [rows[k] for k in epoch_order(len(rows), seed=seed, epoch=epoch)]
    window: list[Batch] = []
    for batch in batches(shuffled, batch_size):
        window.append(batch)
        if len(window) == grad_accum:
            yield window
            window = []
    if window:
        yield window


def steps_per_epoch(num_rows: int, *, batch_size: int, grad_accum: int) -> int:
    """Optimizer steps in one epoch."""
    return -(-num_rows // (batch_size * grad_accum))


def total_steps(num_rows: int, spec: TrainingSpec) -> int:
    """Optimizer steps of the whole run."""
    per_epoch = steps_per_epoch(num_rows, batch_size=spec.batch_size, grad_accum=spec.grad_accum)
    return min(per_epoch * spec.epochs, spec.max_steps or per_epoch * spec.epochs)


def run_shape(rows: Sequence[TokenRow], *, batch_size: int, grad_accum: int, seed: int, epochs: int) -> BatchShape:
    """The largest batch that a run over these rows will meet."""
    lengths = np.asarray([len(row.input_ids) for row in rows])
    supervised = np.asarray([int(row.supervised[1:].sum()) for row in rows])
    starts = np.arange(0, len(rows), batch_size)
    tokens = most = 0
    for epoch in range(epochs):
        order = epoch_order(len(rows), seed=seed, epoch=epoch)
        tokens = max(tokens, int(np.add.reduceat(lengths[order], starts).max()))
        most = max(most, int(np.add.reduceat(supervised[order], starts).max()))
    return BatchShape(
        rows=min(batch_size, len(rows)),
        tokens=tokens,
        longest_row=int(lengths.max()),
        supervised=most,
        batches=min(grad_accum, len(starts)),
    )
