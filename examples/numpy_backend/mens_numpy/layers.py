"""The layers, forward and backward.

Each function maps x to ``(y, pull)``; ``pull`` maps the gradient of a loss by y to that by x, and on its way adds to
the gradients of what is trained. Shape letters: T tokens, D width, H query heads, K key/value heads, E head width,
R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import attrs
import numpy as np

from mens_numpy.weights import Array

__all__ = [
    "Answer",
    "Layer",
    "Linear",
    "Parameter",
    "attention",
    "chain",
    "gelu",
    "heads_of",
    "layer_norm",
    "residual",
    "rms_norm",
    "rotate",
    "silu",
]

Pull = Callable[[Array], Array]
Answer = tuple[Array, Pull]
Layer = Callable[[Array], Answer]


@attrs.define(eq=False)
class Parameter:
    """A or B of one module, and the gradient that a window adds up; both float32."""

    value: Array
    gradient: Array


@attrs.define(eq=False)
class Linear:
    """y = x Wᵀ + b + s · (drop(x) Aᵀ) Bᵀ (Hu et al. 2021, LoRA, section 4.1).

    Attributes:
        weight: (out, in), frozen.
        bias: (out,), frozen, or None.
        lora_a: (R, in), or None where there is no adapter.
        lora_b: (out, R), or None.
        scale: s.
        kept: in a training step with dropout p, the function of a shape that draws 0 or 1 / (1 - p); else None.
    """

    weight: Array
    bias: Array | None
    lora_a: Parameter | None = None
    lora_b: Parameter | None = None
    scale: float = 0.0
    kept: Callable[[tuple[int, ...]], Array] | None = None

    def __call__(self, x: Array) -> Answer:
        """Map (T, in) to (T, out)."""
        y = x @ self.weight.T if self.bias is None else x @ self.weight.T + self.bias
        a, b = self.lora_a, self.lora_b
        if a is None or b is None:
            return y, lambda dy: dy @ self.weight
        mask = None if self.kept is None else self.kept(x.shape)
        entered = x if mask is None else x * mask
        narrow = entered @ a.value.T

        def pull(dy: Array) -> Array:
            up = self.scale * (dy @ b.value)
            b.gradient += self.scale * (dy.T @ narrow)
            a.gradient += up.T @ entered
            dx = up @ a.value
            return dy @ self.weight + (dx if mask is None else dx * mask)

        return y + self.scale * (narrow @ b.value.T), pull


def chain(x: Array, layers: Iterable[Layer]) -> Answer:
    """One layer after the other."""
    pulls = []
    for layer in layers:
        x, pull = layer(x)
        pulls.append(pull)

    def back(dy: Array) -> Array:
        for pull in reversed(pulls):
            dy = pull(dy)
        return dy

    return x, back


def residual(layers: Iterable[Layer], x: Array) -> Answer:
    """Add to x what the layers make of it."""
    y, pull = chain(x, layers)
    return x + y, lambda dy: dy + pull(dy)


def heads_of(width: int, x: Array) -> Answer:
    """(T, heads · E) to (T, heads, E)."""
    return x.reshape(len(x), -1, width), lambda dy: dy.reshape(x.shape)


def rms_norm(weight: Array, epsilon: float, x: Array) -> Answer:
    """X / rms(x) · weight over the last axis (Zhang & Sennrich 2019)."""
    inverse = 1 / np.sqrt((x * x).mean(axis=-1, keepdims=True) + np.float32(epsilon))
    normal = x * inverse

    def pull(dy: Array) -> Array:
        slope = dy * weight
        dx: Array = inverse * (slope - normal * (slope * normal).mean(axis=-1, keepdims=True))
        return dx

    return normal * weight, pull


def layer_norm(weight: Array, bias: Array, epsilon: float, x: Array) -> Answer:
    """(x - mean) / deviation · weight + bias over the last axis (Ba et al. 2016): an RMS norm of what is centred."""
    centred, pull = rms_norm(weight, epsilon, x - x.mean(axis=-1, keepdims=True))

    def back(dy: Array) -> Array:
        dx = pull(dy)
        dx -= dx.mean(axis=-1, keepdims=True)
        return dx

    return centred + bias, back


def silu(x: Array) -> Answer:
    """X · sigmoid(x)."""
    gate = 0.5 * (1 + np.tanh(0.5 * x))
    slope = gate * (1 + x * (1 - gate))
    return x * gate, lambda dy: dy * slope


def gelu(x: Array) -> Answer:
    """GPT-2's approximation with tanh (Hendrycks & Gimpel 2016, section 2)."""
    factor = np.float32(np.sqrt(2 / np.pi))
    bent = np.tanh(factor * (x + np.float32(0.044715) * x * x * x))
    slope = 0.5 * (1 + bent) + 0.5 * x * (1 - bent * bent) * factor * (1 + np.float32(3 * 0.044715) * x * x)
    return 0.5 * x * (1 + bent), lambda dy: dy * slope


def rotate(cosine: Array, sine: Array, x: Array) -> Answer:
    """Turn each pair (e, e + E/2) of the heads (T, heads, E) by an angle (Su et al. 2021); back, by its opposite."""
    return _turned(x, cosine, sine), lambda dy: _turned(dy, cosine, -sine)


def attention(
    query: Array, key: Array, value: Array, row_lengths: Sequence[int]
) -> tuple[Array, Callable[[Array], tuple[Array, Array, Array]]]:
    """Causal attention inside each row; (T, H, E), twice (T, K, E) to (T, H, E). The pull gives all three gradients."""
    starts = np.cumsum([0, *row_lengths[:-1]])
    rows = [slice(start, start + length) for start, length in zip(starts, row_lengths, strict=True)]
    answers = [_attend(query[row], key[row], value[row]) for row in rows]

    def pull(dy: Array) -> tuple[Array, Array, Array]:
        parts = [back(dy[row]) for row, (_, back) in zip(rows, answers, strict=True)]
        dq, dk, dv = (np.concatenate([part[n] for part in parts]) for n in range(3))
        return dq, dk, dv

    return np.concatenate([y for y, _ in answers]), pull


def _attend(query: Array, key: Array, value: Array) -> tuple[Array, Callable[[Array], tuple[Array, Array, Array]]]:
    """One row. Every key/value head serves H / K query heads, so its gradient is the sum over them."""
    tokens, heads, width = query.shape
    groups, scale = heads // key.shape[1], np.float32(width**-0.5)
    q, k, v = (np.repeat(x, heads // x.shape[1], axis=1).swapaxes(0, 1) for x in (query, key, value))
    scores = np.where(np.tri(tokens, dtype=bool), scale * (q @ k.swapaxes(1, 2)), np.float32(-np.inf))
    shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
    shares /= shares.sum(axis=-1, keepdims=True)

    def pull(dy: Array) -> tuple[Array, Array, Array]:
        dy = dy.swapaxes(0, 1)
        slopes = dy @ v.swapaxes(1, 2)
        slopes = scale * shares * (slopes - (shares * slopes).sum(axis=-1, keepdims=True))
        dq, dk, dv = slopes @ k, slopes.swapaxes(1, 2) @ q, shares.swapaxes(1, 2) @ dy
        dk, dv = (x.reshape(-1, groups, tokens, width).sum(axis=1) for x in (dk, dv))
        return dq.swapaxes(0, 1), dk.swapaxes(0, 1), dv.swapaxes(0, 1)

    return (shares @ v).swapaxes(0, 1), pull


def _turned(x: Array, cosine: Array, sine: Array) -> Array:
    left, right = np.split(x, 2, axis=-1)
    turned: Array = x * cosine + np.concatenate([-right, left], axis=-1) * sine
    return turned
