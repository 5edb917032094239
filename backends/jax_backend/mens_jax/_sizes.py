"""Static shapes for batches of any length, and how much may be held; plain numbers, so that a plan needs no JAX.

XLA compiles for each shape. A run's largest batch is known when the session opens, so its batches are filled up
to one of three sizes (half, three quarters and all of the largest) with tokens that belong to no row; a run
compiles its step at most three times. Batches beyond the largest, as evaluation may bring them, get a size of
their own, rounded up so that like batches share it.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import numpy as np

from mens_core.exchange import Batch, BatchShape

__all__ = ["Buckets", "Size", "has_room", "logits_chunk", "rounded_up"]

# Shares of the largest batch's tokens and supervised tokens. A batch of few tokens costs less than a compilation.
_TIERS = (0.5, 0.75, 1.0)
_FEW_TOKENS = 512
_MULTIPLE = 16

# Bytes that all layers' products may take to be kept for the backward pass; the base's own size, if that is more.
_ROOM = 1 << 30
# Logits that may exist at the same time, in numbers, and positions that are never too many. XLA's products are
# the faster the more positions share a pass over the head.
_MOST_LOGITS, _LEAST_CHUNK = 1 << 25, 128


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
    """The sizes of a run; ``tiers`` from the smallest to the largest."""

    def __init__(self, shape: BatchShape) -> None:
        longest = _up(shape.longest_row, _MULTIPLE)
        self.tiers = [
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
        for tier in self.tiers:
            if all(tier.holds(size) for size in sizes):
                return tier
        widest = [max(numbers) for numbers in zip(*(attrs.astuple(size) for size in sizes), strict=True)]
        longest, tokens, supervised = (rounded_up(number) for number in widest[1:])
        return Size(rows=rounded_up(widest[0], 1), longest=longest, tokens=tokens, supervised=supervised)


def _up(number: int, multiple: int) -> int:
    return max(1, -(-number // multiple)) * multiple


def rounded_up(number: int, least: int = _MULTIPLE) -> int:
    """To one of four sizes an octave and a multiple of ``least``, so that batches of like size share a compilation."""
    return _up(number, max(least, 1 << max(0, number.bit_length() - 3)))


def has_room(products: int, base: int) -> bool:
    """Whether all layers' products, in bytes, take no more than a gibibyte, or no more than the base itself."""
    return products <= max(base, _ROOM)


def logits_chunk(vocabulary: int) -> int:
    """Positions whose logits exist at the same time."""
    return max(_LEAST_CHUNK, _MOST_LOGITS // vocabulary)
