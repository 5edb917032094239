"""Static shapes for batches of any length.

XLA compiles for each shape. A run's largest batch is known when the session opens, so its batches are filled up
to one of three sizes (half, three quarters and all of the largest) with tokens that belong to no row; a run
compiles its step at most three times. Batches beyond the largest, as evaluation may bring them, get a size of
their own, rounded up so that like batches share it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import attrs
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mens_core.exchange import IGNORE, Batch, BatchShape

__all__ = ["Buckets", "PackedBatch", "Rows", "Size", "fill", "rounded_up", "stack"]

# Shares of the largest batch's tokens and supervised tokens. A batch of few tokens costs less than a compilation.
_TIERS = (0.5, 0.75, 1.0)
_FEW_TOKENS = 512
_MULTIPLE = 16


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


@attrs.frozen(kw_only=True)
class Size:
    """The static numbers of a compiled function: rows, their longest, tokens, supervised tokens."""

    rows: int
    longest: int
    tokens: int
    supervised: int

    @classmethod
    def of(cls, batch: Batch) -> Size:
        """The least size that holds a batch."""
        return cls(
            rows=len(batch.row_lengths),
            longest=int(batch.row_lengths.max()),
            tokens=len(batch.input_ids),
            supervised=batch.supervised_tokens,
        )

    def holds(self, other: Size) -> bool:
        """Whether a batch of the other size fits in."""
        return all(mine >= theirs for mine, theirs in zip(attrs.astuple(self), attrs.astuple(other), strict=True))


class Buckets:
    """The sizes of a run."""

    def __init__(self, shape: BatchShape) -> None:
        longest = _up(shape.longest_row, _MULTIPLE)
        self._tiers = [
            Size(
                rows=shape.rows,
                longest=longest,
                tokens=_up(int(np.ceil(shape.tokens * share)), _MULTIPLE),
                supervised=_up(int(np.ceil(shape.supervised * share)), _MULTIPLE),
            )
            for share in (_TIERS if shape.tokens > _FEW_TOKENS else _TIERS[-1:])
        ]
        self.batches = shape.batches

    def fit(self, batches: Sequence[Batch]) -> Size:
        """The smallest size that holds every one of the batches."""
        sizes = [Size.of(batch) for batch in batches]
        for tier in self._tiers:
            if all(tier.holds(size) for size in sizes):
                return tier
        widest = [max(numbers) for numbers in zip(*(attrs.astuple(size) for size in sizes), strict=True)]
        longest, tokens, supervised = (rounded_up(number) for number in widest[1:])
        return Size(rows=rounded_up(widest[0], 1), longest=longest, tokens=tokens, supervised=supervised)


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


def _up(number: int, multiple: int) -> int:
    return max(1, -(-number // multiple)) * multiple


def rounded_up(number: int, least: int = _MULTIPLE) -> int:
    """To one of four sizes an octave and a multiple of ``least``, so that batches of like size share a compilation."""
    return _up(number, max(least, 1 << max(0, number.bit_length() - 3)))
