"""Causal attention of packed rows on a CPU, by blocks of queries.

::

    keys      ───────────▶
    queries   ▛▀▀▀▜▗             a block of 64 queries sees the keys up to its own end, so that a mask is needed
      │       ▙▄▄▄▟  ▜▖          for its last 64 columns alone; a block's scores stay in the cache
      ▼

Scores and their softmax are float32; weights meet values, and slopes meet keys and queries, in the format of the
inputs, as in PyTorch's own kernel (Dao et al. 2022, FlashAttention, arXiv:2205.14135). The backward pass makes the
weights again from queries and keys, so nothing but query, key and value is kept.

PyTorch's own multiplies blocks of 32 keys by loops of its own, which reach a tenth of the speed of products; for rows
of 118 to 414 tokens this takes 0.5 of its time in bfloat16 and 0.7 in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor as Array

from mens_torch._widened import is_widened, wide

__all__ = ["blockwise_attention", "is_faster"]

# Queries of a block, and scores of a block that stay in the second cache of a core: a mebibyte of float32.
_BLOCK, _IN_CACHE = 64, 1 << 18
# Scores of a block that one thread needs, lest calling takes longer than computing.
_FEW = 1 << 15
# Tokens of a row from which PyTorch's own is as fast.
_LONG = 1024


def is_faster(query: Array, rows: tuple[int, ...]) -> bool:
    """Whether this is the way to take.

    Args:
        query: (1, H, T, E).
        rows: length of each row.
    """
    if is_widened(query):
        # PyTorch's own multiplies bfloat16 at a sixth of its speed, and widened it would keep twice as much.
        return True
    longest = max(rows)
    enough = query.shape[1] * min(_BLOCK, longest) * longest >= _FEW * torch.get_num_threads()
    return query.device.type == "cpu" and enough and longest <= _LONG


def blockwise_attention(query: Array, key: Array, value: Array, rows: tuple[int, ...], scale: float) -> Array:
    """softmax(scale · q kᵀ) v over the tokens of the same row up to the query's own.

    Args:
        query: (1, H, T, E).
        key: (1, K, T, E); query head h reads key/value head h // (H / K).
        value: (1, K, T, E).
        rows: length of each row, summing to T.
        scale: factor on the scores, dimensionless.

    Returns:
        (1, T, H, E), contiguous.
    """
    attended: Array = _BlockAttention.apply(query, key, value, rows, scale)  # type: ignore[no-untyped-call]
    return attended


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Array, key: Array, value: Array, rows: tuple[int, ...], scale: float) -> Array:
        ctx.save_for_backward(query, key, value)
        ctx.rows, ctx.scale = rows, scale
        attended = query.new_empty(_across(query).shape)
        for parts in _row_by_row(rows, _across(attended), query, key, value):
            _attend(*parts, scale=scale)
        return attended

    @staticmethod
    def backward(ctx: Any, *grads: Array) -> tuple[Array | None, ...]:
        kept = ctx.saved_tensors
        # A token's heads side by side, as linears before and after want them.
        slopes = tuple(_across(part.new_empty(_across(part).shape)) for part in kept)
        for of_query, of_key, of_value, *given in _row_by_row(ctx.rows, *slopes, _across(grads[0]), *kept):
            _slope((of_query, of_key, of_value), *given, scale=ctx.scale)
        return *slopes, None, None


def _across(part: Array) -> Array:
    """(1, T, heads, E) of (1, heads, T, E), or back; no copy."""
    return part.transpose(1, 2)


def _row_by_row(rows: tuple[int, ...], *parts: Array) -> Iterator[tuple[Array, ...]]:
    """(heads, L, E) of each part, for one row after the other."""
    return zip(*(torch.split(part[0], list(rows), dim=1) for part in parts), strict=True)


def _attend(attended: Array, query: Array, key: Array, value: Array, *, scale: float) -> None:
    """Write one row's attention, (H, L, E) like the query."""
    scaled, wide_key, value = query.float() * scale, key.float(), wide(value)
    for queries, keys, heads, own in _blocks(query, key):
        weights = _weights(_stacked(scaled, heads, queries, own), wide_key[own, keys], queries)
        made = torch.bmm(weights.to(value.dtype), value[own, keys])
        attended[heads, queries] = made.view(-1, queries.stop - queries.start, query.shape[2])


def _slope(
    slopes: tuple[Array, Array, Array], slope: Array, query: Array, key: Array, value: Array, *, scale: float
) -> None:
    """Write those of one row's query, key and value, given that of its attention."""
    of_query, of_key, of_value = slopes
    scaled, wide_key, wide_value, wide_slope = query.float() * scale, key.float(), value.float(), slope.float()
    query, key, slope = wide(query), wide(key), wide(slope)
    key_sum, value_sum = (torch.zeros(key.shape, dtype=torch.float32) for _ in range(2))
    for queries, keys, heads, own in _blocks(query, key):
        weights = _weights(_stacked(scaled, heads, queries, own), wide_key[own, keys], queries)
        of_weights = torch.bmm(_stacked(wide_slope, heads, queries, own), wide_value[own, keys].transpose(1, 2))
        of_scores = torch._softmax_backward_data(of_weights, weights, -1, torch.float32).to(key.dtype)  # noqa: SLF001
        weights = weights.to(key.dtype)
        value_sum[own, keys] += torch.bmm(weights.transpose(1, 2), _stacked(slope, heads, queries, own))
        key_sum[own, keys] += torch.bmm(of_scores.transpose(1, 2), _stacked(query, heads, queries, own))
        made = torch.baddbmm(of_scores.new_empty(()), of_scores, key[own, keys], beta=0, alpha=scale)
        of_query[heads, queries] = made.view(-1, queries.stop - queries.start, query.shape[2])
    of_key.copy_(key_sum.mul_(scale))
    of_value.copy_(value_sum)


def _blocks(query: Array, key: Array) -> Iterator[tuple[slice, slice, slice, slice]]:
    """(queries, keys they see, query heads, their key/value heads) of each block."""
    length, kv_heads = key.shape[1], key.shape[0]
    group = query.shape[0] // kv_heads
    for start in range(0, length, _BLOCK):
        stop = min(length, start + _BLOCK)
        together = max(1, _IN_CACHE * torch.get_num_threads() // (group * (stop - start) * stop))
        for first in range(0, kv_heads, together):
            last = min(kv_heads, first + together)
            yield slice(start, stop), slice(0, stop), slice(first * group, last * group), slice(first, last)


def _stacked(part: Array, heads: slice, queries: slice, own: slice) -> Array:
    """(K', H'/K' · l, E): the queries of all heads that read one key/value head, below each other."""
    return part[heads, queries].reshape(own.stop - own.start, -1, part.shape[2])


def _weights(query: Array, key: Array, queries: slice) -> Array:
    """Softmax of (K', G · l, E) scaled queries over (K', b, E) keys, of which the last l are the queries' own."""
    scores, own = torch.bmm(query, key.transpose(1, 2)), queries.stop - queries.start
    later = torch.full((own, own), float("-inf")).triu_(1)
    scores.view(len(key), -1, own, key.shape[1])[..., -own:].add_(later)
    return torch.softmax(scores, dim=-1)
