"""Causal attention within each row of a packed batch.

::

    tokens, end to end          one (row, key/value head) at a time, read where it lies
    a a a b b c c c c   ──▶      ▛          a query block sees the keys up to its own end;
                                 ▛▛         blocks past the end of the row are not computed
                                 ▛▛▛

On a CPU XLA's batched products and scatters are slow, so there each (row, head) is cut out, multiplied as plain
matrices and written back, and computed again in the backward pass. A cut is as long as the longest row and may
reach into the next rows; rows go in order, so that what it leaves there is overwritten by the rows it belongs to.
Elsewhere the rows are padded to one length and JAX's own attention runs.
Shape letters: N rows, L longest row, T tokens, H query heads, K key/value heads, G = H / K, E head width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from mens_jax._arrays import dot, keep, take
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
    on_cpu = functools.partial(_row_by_row, rows=rows, window=window, scale=scale)
    elsewhere = functools.partial(_padded, rows=rows, window=window, scale=scale)
    return keep(lax.platform_dependent(query, key, value, cpu=on_cpu, default=elsewhere))


def _padded(query: Array, key: Array, value: Array, rows: Rows, window: Array | None, scale: float) -> Array:
    """All rows at once, padded to (N, L)."""
    slots, tokens, filled, real = rows.slots(len(query)), rows.tokens(len(query)), rows.filled(), rows.real(len(query))
    from_slots, from_tokens = jnp.where(real, slots, -1), jnp.where(filled, tokens, -1).reshape(-1)

    def pad(part: Array) -> Array:
        return take(part, tokens.reshape(-1), from_slots).reshape(*tokens.shape, *part.shape[1:])

    seen = None if window is None else _seen(0, rows.longest, window)[None, None]
    parts = pad(query), pad(key), pad(value)
    with jax.default_matmul_precision("highest"):
        output = jax.nn.dot_product_attention(*parts, mask=seen, is_causal=True, scale=scale)
    return take(output.reshape(-1, *query.shape[1:]), slots, from_tokens)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _row_by_row(query: Array, key: Array, value: Array, rows: Rows, window: Array | None, scale: float) -> Array:
    """One (row, key/value head) after the other."""

    def attend(query: Array, key: Array, value: Array, length: Array) -> tuple[Array]:
        return (_attend(query, key, value, length, window, scale),)

    return _over_pairs(attend, rows, (query, key, value), (query,))[0]


def _row_by_row_forward(
    query: Array, key: Array, value: Array, rows: Rows, window: Array | None, scale: float
) -> tuple[Array, tuple[Array, Array, Array, Rows, Array | None]]:
    return _row_by_row(query, key, value, rows, window, scale), (query, key, value, rows, window)


def _row_by_row_backward(
    scale: float, kept: tuple[Array, Array, Array, Rows, Array | None], gradient: Array
) -> tuple[Array, Array, Array, None, None]:
    query, key, value, rows, window = kept

    def pull(query: Array, key: Array, value: Array, upstream: Array, length: Array) -> tuple[Array, ...]:
        # The cut's part beyond the row is the next rows' gradient.
        upstream = jnp.where(jnp.arange(rows.longest)[:, None] < length, upstream, jnp.zeros((), upstream.dtype))
        _, pullback = jax.vjp(lambda q, k, v: _attend(q, k, v, length, window, scale), query, key, value)
        found: tuple[Array, ...] = pullback(upstream)
        return found

    found = _over_pairs(pull, rows, (query, key, value, gradient), (query, key, value))
    return found[0], found[1], found[2], None, None


_row_by_row.defvjp(_row_by_row_forward, _row_by_row_backward)


def _over_pairs(
    function: Callable[..., tuple[Array, ...]],
    rows: Rows,
    parts: tuple[Array, ...],
    like: tuple[Array, ...],
) -> list[Array]:
    """Call ``function`` on each (row, key/value head): its cut of every part and the row's length.

    Args:
        function: of such cuts and a length, giving such cuts.
        rows: where the rows lie.
        parts: (T, H, E) or (T, K, E) each; the second has K heads.
        like: what the results are shaped as.

    Returns:
        (T, …) each; zero where a token belongs to no row.
    """
    heads, longest = parts[1].shape[1], rows.longest
    flat = [jnp.pad(part, ((0, longest), (0, 0), (0, 0))) for part in parts]
    starts = jnp.cumsum(rows.lengths) - rows.lengths

    def visit(pair: Array, results: list[Array]) -> list[Array]:
        row, head = pair // heads, pair % heads
        # Cuts are (group, L, E), the group being the query heads of one key/value head.
        places = [(starts[row], head * (part.shape[1] // heads), 0) for part in (*flat, *results)]
        cuts = [
            lax.dynamic_slice(part, place, (longest, part.shape[1] // heads, part.shape[2])).transpose(1, 0, 2)
            for part, place in zip(flat, places, strict=False)
        ]
        found = function(*cuts, rows.lengths[row])
        return [
            lax.dynamic_update_slice(result, part.transpose(1, 0, 2), place)
            for result, part, place in zip(results, found, places[len(flat) :], strict=True)
        ]

    empty = [jnp.zeros((part.shape[0] + longest, *part.shape[1:]), part.dtype) for part in like]
    results = lax.fori_loop(0, len(rows.lengths) * heads, visit, empty)
    return [result[: len(part)] for result, part in zip(results, like, strict=True)]


def _attend(query: Array, key: Array, value: Array, length: Array, window: Array | None, scale: float) -> Array:
    """(G, L, E), (1, L, E), (1, L, E) to (G, L, E); blocks of queries from ``length`` on are zero."""
    group, longest, width = query.shape
    block = max(_SMALLEST_BLOCK, -(-longest // _MOST_BLOCKS))
    outputs = []
    for start in range(0, longest, block):
        stop = min(start + block, longest)

        def attend(start: int = start, stop: int = stop) -> Array:
            scores = dot(query[:, start:stop].reshape(-1, width), key[0, :stop].T, jnp.float32) * scale
            seen = jnp.tile(_seen(start, stop, window), (group, 1))
            weights = jax.nn.softmax(jnp.where(seen, scores, _HIDDEN), axis=-1).astype(value.dtype)
            return dot(weights, value[0, :stop]).reshape(group, stop - start, width)

        def skip(start: int = start, stop: int = stop) -> Array:
            return jnp.zeros((group, stop - start, width), value.dtype)

        outputs.append(lax.cond(length > start, attend, skip))
    return jnp.concatenate(outputs, axis=1)


def _seen(start: int, stop: int, window: Array | None) -> Array:
    """(stop - start, stop) bool: which keys the queries from ``start`` to ``stop`` see."""
    behind = jnp.arange(start, stop)[:, None] - jnp.arange(stop)[None]
    return (behind >= 0) if window is None else (behind >= 0) & (behind < window)
