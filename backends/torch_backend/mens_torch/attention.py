"""Causal attention within each row of a packed batch.

::

    row 0 ▛          a token sees itself and what came before it in its own row; no mask is built,
    row 1   ▛        because each row is a causal attention of its own
    row 2     ▛▖

On a CPU, where it was measured to be faster, by blocks of queries (``_blockwise``), else by PyTorch's own.

Shape letters: T tokens, H query heads, K key/value heads (H a multiple of K), E head width.
"""

from __future__ import annotations

import torch
from torch import Tensor as Array
from torch.nn import functional

from mens_torch._blockwise import blockwise_attention, is_faster
from mens_torch._formats import rounded
from mens_torch._remade import Origin, remember
from mens_torch._widened import wide

__all__ = ["packed_attention"]


def packed_attention(
    query: Array, key: Array, value: Array, rows: tuple[int, ...], scale: float, window: int | None = None
) -> Array:
    """softmax(scale · q kᵀ) v over the tokens of the same row up to the query's own.

    Args:
        query: (T, H, E).
        key: (T, K, E); query head h reads key/value head h // (H / K).
        value: (T, K, E).
        rows: length of each row, summing to T.
        scale: factor on the scores, dimensionless.
        window: how many tokens a query sees, its own included; None for all.

    Returns:
        (T, H, E), contiguous.
    """
    if (window is None or max(rows) <= window) and is_faster(query, rows):
        return blockwise_attention(query, key, value, rows, scale)
    if len(set(rows)) == 1:
        # Rows of one length are one call over a batch.
        parts = [tuple(part.reshape(len(rows), rows[0], *part.shape[1:]) for part in (query, key, value))]
    else:
        splits = [torch.split(part[None], list(rows), dim=1) for part in (query, key, value)]
        parts = list(zip(*splits, strict=True))
    outputs = [_causal(*(part.transpose(1, 2) for part in row), scale=scale, window=window) for row in parts]
    outputs = [output.transpose(1, 2).flatten(0, 1) for output in outputs]
    if len(outputs) == 1:
        return outputs[0].contiguous()
    joined = torch.cat(outputs)
    # Each row's own is kept for its softmax.
    remember(joined, Origin(_joined, tuple(outputs)))
    return joined


def _joined(*outputs: Array) -> Array:
    return torch.cat(outputs)


def _causal(query: Array, key: Array, value: Array, *, scale: float, window: int | None) -> Array:
    """(N, H, L, E) of N rows that have the same length L."""
    band = _band(query, window)
    attended = functional.scaled_dot_product_attention(
        wide(query),
        wide(key),
        wide(value),
        attn_mask=band,
        is_causal=band is None,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return rounded(attended, query.dtype)


def _band(query: Array, window: int | None) -> Array | None:
    """(L, L) bool, True where a query sees a key; None where the window holds the whole row."""
    length = query.shape[2]
    if window is None or length <= window:
        return None
    ones = torch.ones(length, length, dtype=torch.bool, device=query.device)
    return ones.tril().triu(1 - window)
