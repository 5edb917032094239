"""Token rows → packed batches → accumulation windows, in an order that only the seed decides.

    rows, shuffled per epoch ──▶ batch: rows end to end ──▶ window: grad_accum batches ──▶ one step

Nothing is padded: a batch holds exactly its rows' tokens. Without packing it takes ``batch_size`` rows as they come;
with best-fit packing the rows are first put into bins of ``seq_len`` tokens, and it takes ``batch_size`` bins. The
last window of an epoch may hold fewer batches and its last batch fewer rows; it is stepped by itself.
"""

from __future__ import annotations

from collections.abc import Iterator

import attrs
import numpy as np
from numpy.typing import NDArray

from mens_core.contract import FineTuneContract
from mens_core.exchange import IGNORE, Batch, BatchShape
from mens_core.sections import TrainingSpec
from mens_core.text.tokens import TokenRows

__all__ = ["Batching", "best_fit", "epoch_order", "pack", "total_steps"]

_Places = NDArray[np.int64]


def pack(rows: TokenRows) -> Batch:
    """Lay rows end to end and shift the targets by one inside each row.

    Raises:
        ValueError: if there is no row.
    """
    if not len(rows):
        raise ValueError("a batch has at least one row")
    lengths = rows.lengths
    ends = np.cumsum(lengths)
    starts = ends - lengths
    here = np.arange(ends[-1])
    tokens = here + np.repeat(rows.starts - starts, lengths)
    input_ids, supervised = rows.input_ids[tokens], rows.supervised[tokens]
    # What follows a row's last token is the next row's.
    supervised[starts] = False
    targets = np.full(len(input_ids), IGNORE, np.int32)
    np.copyto(targets[:-1], input_ids[1:], where=supervised[1:])
    return Batch(
        input_ids=input_ids,
        positions=(here - np.repeat(starts, lengths)).astype(np.int32),
        targets=targets,
        row_lengths=lengths.astype(np.int32),
    )


def epoch_order(num_rows: int, *, seed: int, epoch: int) -> _Places:
    """The permutation of one epoch; a function of its arguments alone (Philox, keyed by seed and epoch)."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(num_rows)


def best_fit(lengths: NDArray[np.int64], capacity: int) -> list[_Places]:
    """Put rows into bins: the longest first, each into the fullest bin that still has room for it.

    Best-fit decreasing needs at most 11/9 of the fewest possible bins, and 4 more (Johnson 1973). How many there are
    depends on the lengths alone; rows of one length go in the order given.

    Args:
        lengths: (rows,) tokens of each row, from 1 to ``capacity``.
        capacity: tokens of a bin.

    Returns:
        For each bin the places of its rows.
    """
    bins: list[list[int]] = []
    # Bins by the room that is left in them; in ``open_rooms`` the bit of every room that a bin has is set.
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    open_rooms = 0
    for place in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[place])
        fitting = open_rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            chosen = by_room[room].pop()
            open_rooms &= ~(1 << room) if not by_room[room] else -1
            bins[chosen].append(place)
        else:
            room, chosen = capacity, len(bins)
            bins.append([place])
        by_room[room - length].append(chosen)
        open_rooms |= 1 << (room - length)
    return [np.asarray(places, np.int64) for places in bins]


@attrs.frozen(kw_only=True)
class Batching:
    """How a run's rows become batches and windows.

    Attributes:
        batch_size: rows, or with packing bins, in a batch.
        grad_accum: batches in a window.
        seed: decides the order.
        bin_tokens: tokens of a bin; None without packing.
    """

    batch_size: int
    grad_accum: int
    seed: int
    bin_tokens: int | None = None

    @classmethod
    def of(cls, contract: FineTuneContract) -> Batching:
        """As a contract asks."""
        spec = contract.training
        return cls(
            batch_size=spec.batch_size,
            grad_accum=spec.grad_accum,
            seed=spec.seed,
            bin_tokens=contract.data.seq_len if spec.packing == "best-fit" else None,
        )

    def batches(self, lengths: NDArray[np.int64], epoch: int) -> list[_Places]:
        """For each batch of an epoch the places of its rows."""
        order = epoch_order(len(lengths), seed=self.seed, epoch=epoch)
        if self.bin_tokens is None:
            return [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        bins = [order[places] for places in best_fit(lengths[order], self.bin_tokens)]
        # Out of the order of their making, in which the fullest come first.
        shuffled = epoch_order(len(bins), seed=self.seed, epoch=epoch)
        groups = [shuffled[start : start + self.batch_size] for start in range(0, len(bins), self.batch_size)]
        return [np.concatenate([bins[k] for k in group]) for group in groups]

    def count(self, lengths: NDArray[np.int64]) -> int:
        """Batches in every epoch."""
        units = len(lengths) if self.bin_tokens is None else len(best_fit(lengths, self.bin_tokens))
        return -(-units // self.batch_size)

    def steps(self, lengths: NDArray[np.int64]) -> int:
        """Optimizer steps in every epoch."""
        return -(-self.count(lengths) // self.grad_accum)

    def windows(self, rows: TokenRows, epoch: int, first: int = 0) -> Iterator[list[Batch]]:
        """One epoch's accumulation windows from the ``first`` on, each a list of 1 to ``grad_accum`` batches."""
        chosen = self.batches(rows.lengths, epoch)
        for start in range(first * self.grad_accum, len(chosen), self.grad_accum):
            yield [pack(rows.take(places)) for places in chosen[start : start + self.grad_accum]]

    def shape(self, rows: TokenRows, epochs: int) -> BatchShape:
        """The largest batch that a run over these rows will meet."""
        lengths = rows.lengths
        most_rows = tokens = supervised = count = 0
        for epoch in range(epochs):
            chosen = self.batches(lengths, epoch)
            starts = np.cumsum([0, *map(len, chosen)])[:-1]
            places, count = np.concatenate(chosen), len(chosen)
            most_rows = max(most_rows, *map(len, chosen))
            tokens = max(tokens, int(np.add.reduceat(lengths[places], starts).max()))
            supervised = max(supervised, int(np.add.reduceat(rows.trained[places], starts).max()))
        return BatchShape(
            rows=most_rows,
            tokens=tokens,
            longest_row=int(lengths.max()),
            supervised=supervised,
            batches=min(self.grad_accum, count),
        )


def total_steps(per_epoch: int, spec: TrainingSpec) -> int:
    """Optimizer steps of the whole run."""
    return min(per_epoch * spec.epochs, spec.max_steps or per_epoch * spec.epochs)
