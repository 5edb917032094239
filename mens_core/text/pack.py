"""Token rows → packed batches → accumulation windows, in an order that only the seed decides.

    rows, shuffled per epoch ──▶ batch: rows end to end ──▶ window: grad_accum batches ──▶ one step

Nothing is padded: a batch holds exactly its rows' tokens. Without packing it takes ``batch_size`` rows as they come;
with best-fit packing the rows are first put into bins of ``seq_len`` tokens, and it takes ``batch_size`` bins. The
last window of an epoch may hold fewer batches and its last batch fewer rows; it is stepped by itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from mens_core.contract import FineTuneContract
from mens_core.exchange import IGNORE, Batch, BatchShape
from mens_core.sections import TrainingSpec
from mens_core.text.tokens import TokenRows

__all__ = ["Batching", "best_fit", "epoch_order", "pack", "total_steps"]

_Places = NDArray[np.integer[Any]]

# The largest batch is looked for among the batches of so many rows, or bins, at a time.
_AT_A_TIME = 1 << 16


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
    generator = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    # Drawn alike for either size of number.
    return generator.permutation(np.arange(num_rows, dtype=np.int32 if num_rows < 1 << 31 else np.int64))


def best_fit(lengths: NDArray[np.int64], capacity: int) -> list[NDArray[np.int64]]:
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

    def batches(self, rows: TokenRows, epoch: int, first: int = 0) -> Iterator[_Places]:
        """For each batch of an epoch from the ``first`` on the places of its rows."""
        order = epoch_order(len(rows), seed=self.seed, epoch=epoch)
        if self.bin_tokens is None:
            return self._grouped(order, first)
        bins = [order[places] for places in best_fit(rows.lengths[order], self.bin_tokens)]
        # Out of the order of their making, in which the fullest come first.
        shuffled = epoch_order(len(bins), seed=self.seed, epoch=epoch)
        return (np.concatenate([bins[k] for k in group]) for group in self._grouped(shuffled, first))

    def count(self, rows: TokenRows) -> int:
        """Batches in every epoch."""
        units = len(rows) if self.bin_tokens is None else len(best_fit(rows.lengths, self.bin_tokens))
        return -(-units // self.batch_size)

    def steps(self, rows: TokenRows) -> int:
        """Optimizer steps in every epoch."""
        return -(-self.count(rows) // self.grad_accum)

    def windows(self, rows: TokenRows, epoch: int, first: int = 0) -> Iterator[list[Batch]]:
        """One epoch's accumulation windows from the ``first`` on, each a list of 1 to ``grad_accum`` batches."""
        batches = self.batches(rows, epoch, first * self.grad_accum)
        while chosen := list(itertools.islice(batches, self.grad_accum)):
            yield [pack(rows.take(places)) for places in chosen]

    def shape(self, rows: TokenRows, epochs: int) -> BatchShape:
        """The largest batch that a run over these rows will meet."""
        at_a_time = max(1, _AT_A_TIME // self.batch_size)
        most_rows = tokens = supervised = longest = count = 0
        for epoch in range(epochs):
            batches, count = self.batches(rows, epoch), 0
            while some := list(itertools.islice(batches, at_a_time)):
                sizes = [len(places) for places in some]
                starts = np.cumsum([0, *sizes[:-1]])
                met = rows.take(np.concatenate(some))
                lengths = met.lengths
                most_rows = max(most_rows, *sizes)
                tokens = max(tokens, int(np.add.reduceat(lengths, starts).max()))
                supervised = max(supervised, int(np.add.reduceat(met.trained, starts).max()))
                longest = max(longest, int(lengths.max()))
                count += len(some)
        return BatchShape(
            rows=most_rows,
            tokens=tokens,
            longest_row=longest,
            supervised=supervised,
            batches=min(self.grad_accum, count),
        )

    def _grouped(self, units: _Places, first: int) -> Iterator[_Places]:
        starts = range(first * self.batch_size, len(units), self.batch_size)
        return (units[start : start + self.batch_size] for start in starts)


def total_steps(per_epoch: int, spec: TrainingSpec) -> int:
    """Optimizer steps of the whole run."""
    return min(per_epoch * spec.epochs, spec.max_steps or per_epoch * spec.epochs)
