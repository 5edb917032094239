"""How much a run has to compute, from its rows or from a sample of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mens_core.plan import Workload
from mens_core.sections import TrainingSpec
from mens_core.text.encode import TokenRow
from mens_core.text.pack import run_shape, steps_per_epoch, total_steps

__all__ = ["workload"]

# Rows that a sample is repeated to, so that the largest batch is that of many draws.
_ROWS_DRAWN = 20_000


def workload(rows: Sequence[TokenRow], spec: TrainingSpec, *, num_rows: int, source: str) -> Workload:
    """Describe a run.

    Args:
        rows: all rows of the run, or a sample of them; at least one.
        spec: batch, accumulation, epochs and seed.
        num_rows: how many rows the run has.
        source: where the rows come from, for people.
    """
    lengths = np.asarray([len(row.input_ids) for row in rows], np.float64)
    supervised = np.asarray([int(row.supervised[1:].sum()) for row in rows], np.float64)
    drawn = rows if len(rows) >= num_rows else _repeated(rows, min(num_rows, _ROWS_DRAWN))
    per_epoch = steps_per_epoch(num_rows, batch_size=spec.batch_size, grad_accum=spec.grad_accum)
    rows_a_step = num_rows / per_epoch
    return Workload(
        shape=run_shape(
            drawn, batch_size=spec.batch_size, grad_accum=spec.grad_accum, seed=spec.seed, epochs=spec.epochs
        ),
        batches=-(-num_rows // spec.batch_size) / per_epoch,
        tokens=float(lengths.mean()) * rows_a_step,
        supervised=float(supervised.mean()) * rows_a_step,
        pairs=float((lengths**2).mean()) * rows_a_step,
        rows=num_rows,
        row_tokens=float(lengths.mean()),
        steps=total_steps(num_rows, spec),
        source=source,
    )


def _repeated(rows: Sequence[TokenRow], count: int) -> list[TokenRow]:
    return [rows[place % len(rows)] for place in range(count)]
