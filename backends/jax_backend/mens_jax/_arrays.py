"""Products in full precision, gathers that XLA runs well in both directions, placement by name, memory to hand over."""

from __future__ import annotations

import math
import mmap
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from numpy.typing import NDArray

__all__ = ["KEPT", "device_named", "dot", "keep", "take", "to_hand_over"]

KEPT = "product"
"""The name under which ``keep`` marks arrays."""


def device_named(name: str) -> jax.Device:
    """JAX's object for ``cpu`` or ``cuda:N``, as ``device.pick_device`` names it."""
    platform, _, index = name.partition(":")
    return jax.devices(platform)[int(index or 0)]


def to_hand_over(shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    """Fresh memory on the host that ``jax.device_put`` takes over as it is, after which nobody may write into it.

    On a CPU it copies what does not begin at a multiple of 64 bytes; whole pages do. All of them are asked for at
    once, which costs less than a fault for each.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_POPULATE", 0)
    pages = mmap.mmap(-1, max(size, 1), flags=flags)
    return np.frombuffer(pages, dtype, math.prod(shape)).reshape(shape)


def dot(x: Array, y: Array, dtype: Any = None) -> Array:
    """X y in full precision; the result is of type ``dtype``, or of the arguments' type."""
    return jnp.matmul(x, y, precision=lax.Precision.HIGHEST, preferred_element_type=dtype)


def keep(product: Array) -> Array:
    """Mark an array that may be kept for the backward pass instead of computed again (``_blocks.scan_blocks``)."""
    marked: Array = checkpoint_name(product, KEPT)  # type: ignore[no-untyped-call]
    return marked


@jax.custom_vjp
def take(values: Array, index: Array, back: Array) -> Array:
    """values[index], for an ``index`` that meets each entry of ``values`` at most once where it counts.

    The transpose of a gather is a scatter, which XLA runs as a scalar loop on a CPU. Where every entry is met at
    most once, the transpose is a gather as well, along ``back``.

    Args:
        values: (n, …).
        index: (m,) int32, in 0 … n - 1.
        back: (n,) int32, the place in ``index`` that reads each entry, or -1 where the gradient is zero.

    Returns:
        (m, …).
    """
    del back
    return values[index]


def _take_forward(values: Array, index: Array, back: Array) -> tuple[Array, Array]:
    return values[index], back


def _take_backward(back: Array, gradient: Array) -> tuple[Array, None, None]:
    met = (back >= 0).reshape(-1, *[1] * (gradient.ndim - 1))
    return jnp.where(met, gradient[jnp.maximum(back, 0)], jnp.zeros((), gradient.dtype)), None, None


take.defvjp(_take_forward, _take_backward)
