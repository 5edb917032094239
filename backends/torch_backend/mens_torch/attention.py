"""Causal attention within each row of a packed batch.

::

    row 0 ▛          a token sees itself and what came before it in its own row; no mask is built,
    row 1   ▛        because each row is a causal attention of its own
    row 2     ▛▖

Shape letters: T tokens, H query heads, K key/value heads (H a multiple of K), E head width.
"""

from __future__ import annotations

import torch
from torch import Tensor as Array
from torch.nn import functional

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
    grouped = query.shape[1] != key.shape[1]
    if len(set(rows)) == 1:
        # Rows of one length are one call over a batch.
        parts = [[part.reshape(len(rows), rows[0], *part.shape[1:]) for part in (query, key, value)]]
    else:
        splits = (part.split(list(rows)) for part in (query, key, value))
        parts = [[part[None] for part in row] for row in zip(*splits, strict=True)]
    outputs = [
        functional.scaled_dot_product_attention(
            *(part.transpose(1, 2) for part in row),
            attn_mask=_band(row[0], window),
            is_causal=window is None or row[0].shape[1] <= window,
            scale=scale,
            enable_gqa=grouped,
        )
        for row in parts
    ]
    return torch.cat([output.transpose(1, 2).flatten(0, 1) for output in outputs])


def _band(query: Array, window: int | None) -> Array | None:
    """(L, L) bool, True where a query sees a key; None where the window holds the whole row."""
    length = query.shape[1]
    if window is None or length <= window:
        return None
    ones = torch.ones(length, length, dtype=torch.bool, device=query.device)
    return ones.tril().triu(1 - window)
