"""A linear layer with its adapter, and the adapter merged away (Hu et al. 2021, LoRA, section 4.1)."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

__all__ = ["linear", "merged"]

Array = NDArray[Any]


def linear(
    x: Array, weight: Array, bias: Array | None, lora_a: Array | None, lora_b: Array | None, scale: float
) -> Array:
    """Y = x Wᵀ + b + s · (x Aᵀ) Bᵀ.

    Args:
        x: (T, in).
        weight: (out, in).
        bias: (out,), or None.
        lora_a: (R, in), or None where the layer is not adapted.
        lora_b: (out, R), or None where the layer is not adapted.
        scale: s, dimensionless.

    Returns:
        (T, out).
    """
    y = x @ weight.T
    if bias is not None:
        y = y + bias
    if lora_a is not None and lora_b is not None:
        y = y + scale * ((x @ lora_a.T) @ lora_b.T)
    return y


def merged(weight: Array, lora_a: Array, lora_b: Array, scale: float) -> Array:
    """W + s · B A.

    Args:
        weight: (out, in).
        lora_a: (R, in).
        lora_b: (out, R).
        scale: s, dimensionless.

    Returns:
        (out, in) float64.
    """
    product: Array = lora_b.astype(float) @ lora_a.astype(float)
    return weight.astype(float) + scale * product
