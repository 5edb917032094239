"""How much a run has to compute, from its rows or from a sample of them."""

from __future__ import annotations

import numpy as np

from mens_core.contract import FineTuneContract
from mens_core.plan import Workload
from mens_core.text.pack import Batching, total_steps
from mens_core.text.tokens import TokenRows

__all__ = ["workload"]

# Rows that a sample is repeated to, so that the largest batch is that of many draws.
_ROWS_DRAWN = 20_000


def workload(rows: TokenRows, contract: FineTuneContract, *, num_rows: int, source: str) -> Workload:
    """Describe a run.

    Args:
        rows: all rows of the run, or a sample of them; at least one.
        contract: batch, accumulation, packing, epochs and seed.
        num_rows: how many rows the run has.
        source: where the rows come from, for people.
    """
    batching, spec = Batching.of(contract), contract.training
    lengths = rows.lengths.astype(np.float64)
    drawn = rows if len(rows) >= num_rows else rows.take(np.arange(min(num_rows, _ROWS_DRAWN)) % len(rows))
    batches = -(-batching.count(drawn) * num_rows // len(drawn))
    per_epoch = -(-batches // spec.grad_accum)
    rows_a_step = num_rows / per_epoch
    return Workload(
        shape=batching.shape(drawn, spec.epochs),
        batches=batches / per_epoch,
        tokens=float(lengths.mean()) * rows_a_step,
        supervised=float(rows.trained.mean()) * rows_a_step,
        pairs=float((lengths**2).mean()) * rows_a_step,
        rows=num_rows,
        row_tokens=float(lengths.mean()),
        steps=total_steps(per_epoch, spec),
        source=source,
    )
