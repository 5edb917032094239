"""NF4 storage of a frozen weight, byte for byte as bitsandbytes holds it (Dettmers et al. 2023, QLoRA, section 3).

::

    weight (out, in) ──▶ blocks of 64 ──▶ absmax of each block (float32, or uint8 by double quantization)
                                     └──▶ codes: nearest of 16 codebook values to weight / absmax, two a byte
    weight ≈ codebook[codes] · absmax

Bringing back is JAX, inside the step. Storing is ``mens_core.nf4``, on the host: XLA flushes subnormal numbers to zero
and fuses products with sums, and either changes bytes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

from mens_core import nf4
from mens_core.exchange import NF4Spec, QuantizedWeight
from mens_core.machine import processors
from mens_core.nf4_scales import NESTED_BLOCK, dynamic_map
from mens_jax._arrays import device_named

__all__ = ["NF4Weight", "dequantize", "export_weight", "import_weight", "quantize"]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "absmax", "nested_absmax", "offset"],
    meta_fields=["shape", "spec"],
)
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class NF4Weight:
    """A weight in NF4 on its device; the fields of ``QuantizedWeight`` as arrays.

    Stacked layers have one more axis in front of each array; ``shape`` stays that of one layer.

    Attributes:
        codes: (ceil(numel / 2),) uint8, the earlier code of a byte in the high nibble.
        absmax: (blocks,) float32, or uint8 with double quantization.
        nested_absmax: (ceil(blocks / 256),) float32, or None without double quantization.
        offset: () float32, or None without double quantization.
        shape: (out, in).
        spec: how it was stored.
    """

    codes: Array
    absmax: Array
    nested_absmax: Array | None
    offset: Array | None
    shape: tuple[int, ...]
    spec: NF4Spec


def quantize(weight: Array | NDArray[Any], spec: NF4Spec) -> NF4Weight:
    """Store a weight in NF4, byte for byte as ``bitsandbytes.functional.quantize_4bit``.

    Args:
        weight: (out, in), any float format; quantised from its float32 value.
        spec: codebook, block size, and whether the scales are quantised too.

    Raises:
        ModelError: if a value is not finite.
    """
    return _placed(nf4.quantize(np.asarray(weight), spec, processors()), None)


@functools.partial(jax.jit, static_argnames="dtype")
def dequantize(weight: NF4Weight, dtype: Any) -> Array:
    """Codebook value times the block's absmax, in float32, then rounded to ``dtype``.

    Returns:
        (out, in).
    """
    absmax, numel = weight.absmax, math.prod(weight.shape)
    if weight.nested_absmax is not None and weight.offset is not None:
        # All scales that a group's blocks can have, of which each takes its own: a scale brought back by itself XLA
        # would bring back again for every weight of its block (1.8 instead of 0.5 ns a weight).
        scaled = weight.nested_absmax[:, None] * dynamic_map()
        # The choice, always the first, keeps XLA from contracting product and sum, which would round once where
        # bitsandbytes rounds twice.
        scales = jnp.where(scaled == scaled, scaled, 0.0) + weight.offset  # noqa: PLR0124
        absmax = scales[np.arange(absmax.shape[0]) // NESTED_BLOCK, absmax]
    # A look-up by whole bytes: half as many as by codes. A tree of choices on the bits is faster by itself and slower
    # in a training step (benchmarks/README.md).
    book, pairs = nf4.CODEBOOKS[weight.spec.codebook], np.arange(256)
    bytes_ = weight.codes.astype(jnp.int32)
    values = jnp.stack([jnp.asarray(book[pairs >> 4])[bytes_], jnp.asarray(book[pairs & 15])[bytes_]], -1).reshape(-1)
    padded = absmax.shape[0] * weight.spec.block_size
    values = jnp.pad(values, (0, padded - values.shape[0])) if padded > values.shape[0] else values[:padded]
    values = (values.reshape(-1, weight.spec.block_size) * absmax[:, None]).reshape(-1)
    return values[:numel].reshape(weight.shape).astype(dtype)


def export_weight(weight: NF4Weight) -> QuantizedWeight:
    """Copy an NF4 weight into the record that crosses the hooks."""
    nested = weight.nested_absmax
    return QuantizedWeight(
        codes=np.array(weight.codes),
        absmax=np.array(weight.absmax),
        nested_absmax=None if nested is None else np.array(nested),
        offset=0.0 if weight.offset is None else float(weight.offset),
        shape=weight.shape,
        spec=weight.spec,
    )


def import_weight(record: QuantizedWeight, device: str) -> NF4Weight:
    """Put a record that crossed the hooks onto a device; the inverse of ``export_weight``."""
    return _placed(record, device_named(device))


def _placed(record: QuantizedWeight, place: jax.Device | None) -> NF4Weight:
    """The record on a device, or where JAX puts arrays by default."""
    nested = record.nested_absmax
    return NF4Weight(
        codes=jax.device_put(record.codes, place),
        absmax=jax.device_put(record.absmax, place),
        nested_absmax=None if nested is None else jax.device_put(nested, place),
        offset=None if nested is None else jax.device_put(np.float32(record.offset), place),
        shape=tuple(record.shape),
        spec=record.spec,
    )
