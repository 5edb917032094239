"""Cross-entropy of the supervised positions, without ever holding all logits.

For a chunk of n positions with hidden states h (n, D), head W (V, D) and targets y::

    z = h Wᵀ          loss = Σ logsumexp(z) − z[y]          dloss/dh = (softmax(z) − onehot(y)) W
                                                            dloss/dW = (softmax(z) − onehot(y))ᵀ h

The gradients are formed while the chunk's logits are there, so at most chunk · V of them exist at a time and the
backward pass has nothing left to do. A head that is frozen gets none; that of one that is trained is summed over the
chunks in float32.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from mens_core.exchange import IGNORE
from mens_jax._arrays import dot

__all__ = ["supervised_loss"]


def supervised_loss(hidden: Array, head: Array, targets: Array, chunk: int = 256, *, trained: bool = False) -> Array:
    """Sum of the cross-entropies, in nats.

    Args:
        hidden: (S, D), the supervised positions' hidden states, in the base's format.
        head: (V, D), same format, or a float32 master that is rounded to it.
        targets: (S,) integer, each in 0 … V - 1, or ``IGNORE`` where a compiled shape has more places than tokens.
        chunk: positions whose logits exist at the same time.
        trained: whether the head gets a gradient, too.

    Returns:
        () float32; log-sum-exp and the sum are taken in float32.
    """
    total: Array = _chunked_cross_entropy(hidden, head, targets, chunk, trained)
    return total


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _chunked_cross_entropy(hidden: Array, head: Array, targets: Array, chunk: int, trained: bool) -> Array:
    del trained
    head = head.astype(hidden.dtype)

    def add(total: Array, part: tuple[Array, Array]) -> tuple[Array, None]:
        return total + _cross_entropy(head, *part)[0], None

    return lax.scan(add, jnp.zeros((), jnp.float32), _split(hidden, targets, chunk))[0]


def _forward(
    hidden: Array, master: Array, targets: Array, chunk: int, trained: bool
) -> tuple[Array, tuple[Array, Array | None]]:
    head = master.astype(hidden.dtype)

    def add(sums: tuple[Array, Array | None], part: tuple[Array, Array]) -> tuple[tuple[Array, Array | None], Array]:
        loss, slopes = _cross_entropy(head, *part)
        slopes, (total, of_head) = slopes.astype(hidden.dtype), sums
        if of_head is not None:
            of_head = of_head + dot(slopes.T, part[0], jnp.float32)
        return (total + loss, of_head), dot(slopes, head)

    zero = jnp.zeros((), jnp.float32), jnp.zeros_like(master) if trained else None
    (total, of_head), gradient = lax.scan(add, zero, _split(hidden, targets, chunk))
    return total, (gradient.reshape(-1, hidden.shape[1])[: hidden.shape[0]], of_head)


def _backward(
    chunk: int, trained: bool, gradients: tuple[Array, Array | None], upstream: Array
) -> tuple[Array, Array | None, None]:
    del chunk, trained
    gradient, of_head = gradients
    return upstream.astype(gradient.dtype) * gradient, None if of_head is None else upstream * of_head, None


_chunked_cross_entropy.defvjp(_forward, _backward)


def _cross_entropy(head: Array, hidden: Array, targets: Array) -> tuple[Array, Array]:
    """Of one chunk: the sum of its losses, () float32, and their derivatives by the logits, (n, V) float32."""
    used = targets[:, None] != IGNORE
    logits = dot(hidden, head.T, jnp.float32)
    top = logits.max(axis=-1, keepdims=True)
    powers = jnp.exp(logits - top)
    total = powers.sum(axis=-1, keepdims=True)
    chosen = jnp.take_along_axis(logits, jnp.maximum(targets[:, None], 0), axis=-1)
    slopes = powers / total - (jnp.arange(head.shape[0]) == targets[:, None])
    return jnp.where(used, jnp.log(total) + top - chosen, 0.0).sum(), jnp.where(used, slopes, 0.0)


def _split(hidden: Array, targets: Array, chunk: int) -> tuple[Array, Array]:
    """Equal chunks of at most ``chunk`` positions; what fills up the last one is not supervised."""
    parts = -(-hidden.shape[0] // chunk)
    size = -(-hidden.shape[0] // parts)
    missing = parts * size - hidden.shape[0]
    hidden = jnp.pad(hidden, ((0, missing), (0, 0))).reshape(parts, size, -1)
    return hidden, jnp.pad(targets, (0, missing), constant_values=IGNORE).reshape(parts, size)
