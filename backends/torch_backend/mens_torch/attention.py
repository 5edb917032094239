"""Causal attention within each row of a packed batch.

::

    row 0 ▛          a token sees itself and what came before it in its own row; no mask is built,
    row 1   ▛        because each row is a causal attention of its own
    row 2     ▛▖

On a CPU, where it was measured to be faster, by blocks of queries (``_blockwise``), else by PyTorch's own.

Shape letters: T tokens, H query heads, K key/value heads (H a multiple of K), E head width, N rows of L tokens. Tensors
come and go as transformers has them, since each view of one is a node of the graph.
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
        query: (1, H, T, E).
        key: (1, K, T, E); query head h reads key/value head h // (H / K).
        value: (1, K, T, E).
        rows: length of each row, summing to T.
        scale: factor on the scores, dimensionless.
        window: how many tokens a query sees, its own included; None for all.

    Returns:
        (1, T, H, E), contiguous.
    """
    if (window is None or max(rows) <= window) and is_faster(query, rows):
        return blockwise_attention(query, key, value, rows, scale)
    parts: tuple[Array, ...] = (query, key, value)
    if len(set(rows)) == 1:
        # Rows of one length are one call over a batch.
        if len(rows) > 1:
            parts = tuple(part.view(-1, len(rows), rows[0], part.shape[3]).transpose(0, 1) for part in parts)
        attended = _causal(*parts, scale=scale, window=window).transpose(1, 2)
        return attended.reshape(1, -1, *attended.shape[2:]).contiguous()
    splits = zip(*(torch.split(part, list(rows), dim=2) for part in parts), strict=True)
    outputs = [_causal(*row, scale=scale, window=window).transpose(1, 2) for row in splits]
    joined = torch.cat(outputs, dim=1)
    # Each row's own is kept for its softmax.
    remember(joined, Origin(_joined, tuple(outputs)))
    return joined


def _joined(*outputs: Array) -> Array:
    return torch.cat(outputs, dim=1)


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
