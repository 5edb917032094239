"""Packed batches filled up to a static size (``_sizes``), on the host, and where their rows lie."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mens_core.exchange import IGNORE, Batch
from mens_jax._sizes import Size

__all__ = ["PackedBatch", "Rows", "fill", "stack"]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["lengths"], meta_fields=["longest"])
@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """Where the rows of a packed batch lie, as a compiled function needs it.

    Two layouts: T tokens end to end, and N · L slots, L for each row, of which the row fills the first.

    Attributes:
        lengths: (N,) int32; 0 for a row that is not there.
        longest: L, static.
    """

    lengths: Array
    longest: int

    def tokens(self, total: int) -> Array:
        """(N, L) int32: the token in each slot; some token of the batch where a slot is empty."""
        starts = jnp.cumsum(self.lengths) - self.lengths
        return jnp.minimum(starts[:, None] + jnp.arange(self.longest), total - 1)

    def slots(self, total: int) -> Array:
        """(T,) int32: the slot of each token; some slot where a token belongs to no row."""
        ends = jnp.cumsum(self.lengths)
        token = jnp.arange(total)
        row = jnp.minimum((token[:, None] >= ends[None]).sum(axis=1), len(ends) - 1)
        return row * self.longest + jnp.minimum(token - (ends - self.lengths)[row], self.longest - 1)

    def filled(self) -> Array:
        """(N, L) bool: which slots hold a token."""
        return jnp.arange(self.longest) < self.lengths[:, None]

    def real(self, total: int) -> Array:
        """(T,) bool: which tokens belong to a row."""
        return jnp.arange(total) < self.lengths.sum()


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["input_ids", "positions", "rows", "keep", "back", "targets"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PackedBatch:
    """A batch filled up to a ``Size``; with one more axis in front, the batches of a window.

    Attributes:
        input_ids: (T,) int32.
        positions: (T,) int32.
        rows: where the rows lie.
        keep: (S,) int32, the supervised positions, then any.
        back: (T,) int32, the place of each position in ``keep``, or -1.
        targets: (S,) int32, the token to predict, or ``IGNORE``.
    """

    input_ids: Array
    positions: Array
    rows: Rows
    keep: Array
    back: Array
    targets: Array


def fill(batch: Batch, size: Size) -> PackedBatch:
    """Fill a batch up with what counts for nothing; the arrays stay on the host."""
    chosen = np.flatnonzero(batch.targets != IGNORE)
    back = _padded([], size.tokens, -1)
    back[chosen] = np.arange(len(chosen))
    return PackedBatch(
        input_ids=_padded(batch.input_ids, size.tokens, 0),
        positions=_padded(batch.positions, size.tokens, 0),
        rows=Rows(_padded(batch.row_lengths, size.rows, 0), size.longest),
        keep=_padded(chosen, size.supervised, 0),
        back=back,
        targets=_padded(batch.targets[chosen], size.supervised, IGNORE),
    )


def stack(window: Sequence[PackedBatch], count: int) -> PackedBatch:
    """The batches of a window one above the other, filled up to ``count`` by repeating the last."""
    filled = [*window, *[window[-1]] * (count - len(window))]
    stacked: PackedBatch = jax.tree.map(lambda *parts: np.stack(parts), *filled)
    return stacked


def _padded(values: Any, length: int, fill: int) -> Any:
    padded = np.full(length, fill, np.int32)
    padded[: len(values)] = values
    return padded
