"""Causal attention within each row of a packed batch.

::

    tokens, end to end          one row per line, padded          each (row, key/value head) by itself
    a a a b b c c c c   ──▶      a a a .     b b . .     ──▶       ▛          a query block sees the keys up to
                                 c c c c     . . . .               ▛▛         its own end; blocks past the end
                                                                   ▛▛▛        of the row are not computed

On a CPU XLA's batched products are slow, so there the (row, head) pairs run one after the other, in plain
products of two matrices, and are computed again in the backward pass. Elsewhere JAX's own attention runs.
Shape letters: N rows, L longest row, T tokens, H query heads, K key/value heads, G = H / K, E head width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

from mens_jax._arrays import dot, take
from mens_jax._packing import Rows

__all__ = ["packed_attention"]

# More blocks skip more and compile longer; on a CPU four of 128 took half the time of one of 512.
_MOST_BLOCKS, _SMALLEST_BLOCK = 4, 64

_HIDDEN = -1e30


def packed_attention(
    query: Array, key: Array, value: Array, rows: Rows, scale: float, window: Array | None = None
) -> Array:
    """softmax(scale · q kᵀ) v over the tokens of the same row up to the query's own.

    Args:
        query: (T, H, E).
        key: (T, K, E); query head h reads key/value head h // (H / K).
        value: (T, K, E).
        rows: where each row lies.
        scale: factor on the scores, dimensionless.
        window: () int32, how many tokens a query sees, its own included; None for all.

    Returns:
        (T, H, E); positions that belong to no row hold nothing of meaning.
    """
    slots, tokens = rows.slots(query.shape[0]), rows.tokens(query.shape[0])
    (count, longest), filled, real = tokens.shape, rows.filled(), rows.real(query.shape[0])
    from_slots, from_tokens = jnp.where(real, slots, -1), jnp.where(filled, tokens, -1).reshape(-1)

    def pad(part: Array) -> Array:
        return take(part, tokens.reshape(-1), from_slots).reshape(count, longest, *part.shape[1:])

    def elsewhere(query: Array, key: Array, value: Array) -> Array:
        seen = None if window is None else _seen(0, longest, longest, window)[None, None]
        return jax.nn.dot_product_attention(query, key, value, mask=seen, is_causal=True, scale=scale)

    def on_cpu(query: Array, key: Array, value: Array) -> Array:
        return _one_by_one(query, key, value, rows.lengths, scale, window)

    output = lax.platform_dependent(pad(query), pad(key), pad(value), cpu=on_cpu, default=elsewhere)
    return take(output.reshape(count * longest, *query.shape[1:]), slots, from_tokens)


def _one_by_one(query: Array, key: Array, value: Array, lengths: Array, scale: float, window: Array | None) -> Array:
    """(N, L, H, E) and (N, L, K, E) to (N, L, H, E), one row and key/value head after the other."""
    count, longest, heads, width = query.shape
    group = heads // key.shape[2]
    query = query.reshape(count, longest, -1, group, width).transpose(0, 2, 3, 1, 4)  # N K G L E
    key, value = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)  # N K L E
    flat = (part.reshape(-1, *part.shape[2:]) for part in (query, key, value))

    def attend(pair: tuple[Array, Array, Array, Array]) -> Array:
        return _blocks(*pair, scale, window)

    output = lax.map(jax.checkpoint(attend), (*flat, jnp.repeat(lengths, key.shape[1])))
    output = output.reshape(count, -1, group, longest, width).transpose(0, 3, 1, 2, 4)
    return output.reshape(count, longest, heads, width)


def _blocks(query: Array, key: Array, value: Array, length: Array, scale: float, window: Array | None) -> Array:
    """(G, L, E), (L, E), (L, E) to (G, L, E); blocks of queries from ``length`` on are zero."""
    group, longest, width = query.shape
    block = max(_SMALLEST_BLOCK, -(-longest // _MOST_BLOCKS))
    outputs = []
    for start in range(0, longest, block):
        stop = min(start + block, longest)

        def attend(start: int = start, stop: int = stop) -> Array:
            scores = dot(query[:, start:stop].reshape(-1, width), key[:stop].T, jnp.float32) * scale
            seen = jnp.tile(_seen(start, stop, stop, window), (group, 1))
            weights = jax.nn.softmax(jnp.where(seen, scores, _HIDDEN), axis=-1).astype(value.dtype)
            return dot(weights, value[:stop]).reshape(group, stop - start, width)

        def skip(start: int = start, stop: int = stop) -> Array:
            return jnp.zeros((group, stop - start, width), value.dtype)

        outputs.append(lax.cond(length > start, attend, skip))
    return jnp.concatenate(outputs, axis=1)


def _seen(start: int, stop: int, keys: int, window: Array | None) -> Array:
    """(stop - start, keys) bool: which keys the queries from ``start`` to ``stop`` see."""
    behind = jnp.arange(start, stop)[:, None] - jnp.arange(keys)[None]
    return (behind >= 0) if window is None else (behind >= 0) & (behind < window)
