"""Rotary positions (Su et al. 2021, RoFormer, section 3.4), with the scalings of long-context checkpoints."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mens_core.errors import ModelError
from mens_core.hf.layout import Layout

__all__ = ["inverse_frequencies", "rotate"]

Array = NDArray[Any]


def inverse_frequencies(layout: Layout) -> NDArray[np.float64]:
    """Radians a position turns each pair of head dimensions by.

    ``default`` is θ^(-2i/E); ``linear`` divides it by a factor; ``llama3`` divides slow frequencies by it, leaves fast
    ones, and goes from one to the other in between (Llama 3.1's reference code).

    Returns:
        (E / 2,).

    Raises:
        ModelError: for another ``rope_type``.
    """
    rope = layout.rope
    frequencies: NDArray[np.float64] = float(rope["rope_theta"]) ** (
        -np.arange(0, layout.head_dim, 2) / layout.head_dim
    )
    match rope["rope_type"]:
        case "default":
            return frequencies
        case "linear":
            return frequencies / float(rope["factor"])
        case "llama3":
            context = layout.config.get("original_max_position_embeddings")
            turns = (context or rope.get("original_max_position_embeddings", layout.max_positions)) * frequencies
            low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
            kept = np.clip((turns / (2 * math.pi) - low) / (high - low), 0.0, 1.0)
            slowed = frequencies / float(rope["factor"])
            return np.asarray(kept * frequencies + (1.0 - kept) * slowed)
    raise ModelError(
        f"the specification has no rotary positions of type {rope['rope_type']!r}",
        expected="default, linear or llama3",
    )


def rotate(x: Array, positions: Array, frequencies: Array) -> Array:
    """Turn each pair (x[i], x[i + E/2]) of a head by its position's angle.

    Args:
        x: (T, heads, E).
        positions: (T,).
        frequencies: (E / 2,), from ``inverse_frequencies``.
    """
    angles = (positions[:, None] * frequencies)[:, None]
    left, right = np.split(x, 2, axis=-1)
    cosine, sine = np.cos(angles), np.sin(angles)
    return np.concatenate([left * cosine - right * sine, right * cosine + left * sine], axis=-1)
