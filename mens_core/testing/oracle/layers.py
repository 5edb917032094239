"""Norms, activations and attention. All of them are analytic, so that a complex step passes through."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["ACTIVATIONS", "attention", "layer_norm", "rms_norm"]

Array = NDArray[Any]


def rms_norm(x: Array, weight: Array, epsilon: float) -> Array:
    """X / √(mean x² + ε) · weight, over the last axis (Zhang & Sennrich 2019)."""
    mean_square: Array = (x * x).mean(axis=-1, keepdims=True)
    return x / np.sqrt(mean_square + epsilon) * weight


def layer_norm(x: Array, weight: Array, bias: Array, epsilon: float) -> Array:
    """(x - mean) / √(variance + ε) · weight + bias, over the last axis (Ba et al. 2016)."""
    centred: Array = x - x.mean(axis=-1, keepdims=True)
    variance: Array = (centred * centred).mean(axis=-1, keepdims=True)
    return centred / np.sqrt(variance + epsilon) * weight + bias


def attention(
    query: Array, key: Array, value: Array, row_lengths: Sequence[int], scale: float, window: int | None
) -> Array:
    """softmax(scale · q kᵀ) v, each row of the batch by itself, no token seeing a later one.

    Args:
        query: (T, H, E).
        key: (T, K, E); query head h reads key/value head h // (H / K) (Ainslie et al. 2023, GQA).
        value: (T, K, E).
        row_lengths: tokens of each row, summing to T.
        scale: factor on the scores, dimensionless.
        window: how many tokens a query sees, its own included; None for all of its row.

    Returns:
        (T, H, E).
    """
    group = query.shape[1] // key.shape[1]
    key, value = np.repeat(key, group, axis=1), np.repeat(value, group, axis=1)
    rows = []
    for end, length in zip(np.cumsum(row_lengths), row_lengths, strict=True):
        q, k, v = (part[end - length : end].transpose(1, 0, 2) for part in (query, key, value))
        distance = np.arange(length)[:, None] - np.arange(length)
        seen = (distance >= 0) & (distance < (window or length))
        rows.append((_softmax(scale * q @ k.transpose(0, 2, 1), seen) @ v).transpose(1, 0, 2))
    return np.concatenate(rows)


def _softmax(scores: Array, seen: Array) -> Array:
    top = np.where(seen, scores.real, -np.inf).max(axis=-1, keepdims=True)
    powers = np.where(seen, np.exp(np.where(seen, scores - top, 0.0)), 0.0)
    total: Array = powers.sum(axis=-1, keepdims=True)
    return powers / total


def _silu(x: Array) -> Array:
    # x · sigmoid(x), the sigmoid as ½ (1 + tanh x/2), which no x overflows
    return 0.5 * x * (1.0 + np.tanh(0.5 * x))


def _gelu_tanh(x: Array) -> Array:
    return 0.5 * x * (1.0 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _gelu(x: Array) -> Array:
    return 0.5 * x * (1.0 + _erf(x / math.sqrt(2)))


def _erf(x: Array) -> Array:
    """The error function; along the imaginary axis to first order, which is all that a complex step asks."""
    real: Array = np.vectorize(math.erf, otypes=[float])(x.real)
    if not np.iscomplexobj(x):
        return real
    slope: Array = (2 / math.sqrt(math.pi)) * np.exp(-x.real * x.real)
    return real + 1j * x.imag * slope


def _relu(x: Array) -> Array:
    return np.where(x.real > 0, x, 0.0)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": _gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": _relu,
    "silu": _silu,
    "swish": _silu,
}
"""Name in config.json → activation (Hendrycks & Gimpel 2016 for gelu, Elfwing et al. 2018 for silu)."""
