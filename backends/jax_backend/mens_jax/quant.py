"""NF4 storage of a frozen weight, byte for byte as bitsandbytes holds it (Dettmers et al. 2023, QLoRA, section 3).

::

    weight (out, in) ──▶ blocks of 64 ──▶ absmax of each block (float32, or uint8 by double quantization)
                                     └──▶ codes: nearest of 16 codebook values to weight / absmax, two a byte
    weight ≈ codebook[codes] · absmax

Bringing back is JAX, inside the step. Storing is done once per weight by NumPy on the host: XLA flushes
subnormal numbers to zero and fuses products with sums, and either changes bytes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

from mens_core.errors import ModelError
from mens_core.exchange import NF4Spec, QuantizedWeight
from mens_jax._arrays import device_named

__all__ = ["NF4Weight", "dequantize", "export_weight", "import_weight", "quantize"]

_Floats: TypeAlias = NDArray[np.float32]

# Dettmers et al. 2023, appendix E.
_CODEBOOK = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)
_MIDDLES = (_CODEBOOK[:-1] + _CODEBOOK[1:]) / np.float32(2)
# What each byte of codes stands for: its high nibble's value and its low nibble's.
_HIGH, _LOW = _CODEBOOK[np.arange(256) >> 4], _CODEBOOK[np.arange(256) & 15]

# Fixed by bitsandbytes: scales that are quantised themselves share a scale in groups of this many.
_NESTED_BLOCK = 256
# bitsandbytes' floor of the absmax; it is subnormal in float32.
_TINY = np.float32(1e-38)
# Numbers compared at a time, so that the fifteen passes over them stay in the cache.
_CHUNK = 1 << 14


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


def quantize(weight: Array, spec: NF4Spec) -> NF4Weight:
    """Store a weight in NF4, byte for byte as ``bitsandbytes.functional.quantize_4bit`` on a CPU.

    Args:
        weight: (out, in), any float format; quantised from its float32 value.
        spec: block size and whether the scales are quantised too.

    Raises:
        ModelError: if a value is not finite.
    """
    values = np.asarray(weight, np.float32).reshape(-1)
    if not np.isfinite(values).all():
        raise ModelError(
            "a weight that is not finite cannot be stored in NF4",
            where=f"weight of shape {tuple(weight.shape)}",
            expected="finite numbers only",
        )
    codes, scales = _quantize_blocks(values, spec.block_size)
    absmax, nested_absmax, offset = _quantize_scales(scales) if spec.double_quant else (scales, None, None)
    return NF4Weight(
        codes=jnp.asarray(codes),
        absmax=jnp.asarray(absmax),
        nested_absmax=None if nested_absmax is None else jnp.asarray(nested_absmax),
        offset=None if offset is None else jnp.asarray(offset),
        shape=tuple(weight.shape),
        spec=spec,
    )


@functools.partial(jax.jit, static_argnames="dtype")
def dequantize(weight: NF4Weight, dtype: Any) -> Array:
    """Codebook value times the block's absmax, in float32, then rounded to ``dtype``.

    Returns:
        (out, in).
    """
    absmax, size = weight.absmax, math.prod(weight.shape)
    if weight.nested_absmax is not None and weight.offset is not None:
        scales = jnp.repeat(weight.nested_absmax, _NESTED_BLOCK)[: absmax.shape[0]]
        scaled = jnp.asarray(_dynamic_map())[absmax] * scales
        # The choice, always the first, keeps XLA from contracting product and sum, which would round once where
        # bitsandbytes rounds twice.
        absmax = jnp.where(scaled == scaled, scaled, 0.0) + weight.offset  # noqa: PLR0124
    # A look-up by whole bytes: half as many as by codes, and several times as fast as arithmetic on the nibbles.
    bytes_ = weight.codes.astype(jnp.int32)
    values = jnp.stack([jnp.asarray(_HIGH)[bytes_], jnp.asarray(_LOW)[bytes_]], axis=-1).reshape(-1)
    padded = absmax.shape[0] * weight.spec.block_size
    values = jnp.pad(values, (0, padded - values.shape[0])) if padded > values.shape[0] else values[:padded]
    values = (values.reshape(-1, weight.spec.block_size) * absmax[:, None]).reshape(-1)
    return values[:size].reshape(weight.shape).astype(dtype)


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
    nested, place = record.nested_absmax, device_named(device)
    return NF4Weight(
        codes=jax.device_put(record.codes, place),
        absmax=jax.device_put(record.absmax, place),
        nested_absmax=None if nested is None else jax.device_put(nested, place),
        offset=None if nested is None else jax.device_put(np.float32(record.offset), place),
        shape=tuple(record.shape),
        spec=record.spec,
    )


def _quantize_blocks(values: _Floats, block_size: int) -> tuple[NDArray[np.uint8], _Floats]:
    """Codes, two a byte, and the absmax of each block; a block at the end may be short."""
    whole = values.size - values.size % block_size
    blocks, rest = values[:whole].reshape(-1, block_size), values[whole:]
    absmax = np.abs(blocks).max(axis=1, initial=0)
    # bitsandbytes multiplies whole blocks by a reciprocal and divides the short one, whose absmax it also floors.
    scaled = (blocks * (np.float32(1) / np.maximum(absmax, _TINY))[:, None]).reshape(-1)
    if rest.size:
        last = np.maximum(np.abs(rest).max(), _TINY)
        absmax, scaled = np.append(absmax, last), np.append(scaled, rest / last)
    codes = np.zeros(scaled.size + scaled.size % 2, np.uint8)
    codes[scaled.size :] = np.searchsorted(_MIDDLES, 0.0)
    for start in range(0, scaled.size, _CHUNK):
        part = scaled[start : start + _CHUNK]
        # A value on the middle between two codes takes the lower one.
        for middle in _MIDDLES:
            codes[start : start + part.size] += part > middle
    return (codes[::2] << np.uint8(4)) | codes[1::2], absmax.astype(np.float32, copy=False)


def _quantize_scales(absmax: _Floats) -> tuple[NDArray[np.uint8], _Floats, np.float32]:
    """Double quantization: 8-bit indices into the dynamic map, the absmax of each group, and the mean."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        offset = np.float32(_torch_sum(absmax) / np.float32(absmax.size))
        centred = absmax - offset
        groups = np.pad(centred, (0, -centred.size % _NESTED_BLOCK)).reshape(-1, _NESTED_BLOCK)
        nested = np.abs(groups).max(axis=1)
        unit = np.clip(groups * (np.float32(1) / nested)[:, None], -1, 1)
    # bitsandbytes looks the nearest map entry up in a table of 65536 places; place and value as its C code rounds.
    halved = ((unit + np.float32(1)) * np.float32(0.5)).astype(np.float64)
    places = np.nan_to_num((halved * 65535 + 0.5).astype(np.float32), nan=0.0).astype(np.uint16)
    places[nested == 0] = 0
    return _nearest_table()[places].reshape(-1)[: absmax.size], nested, offset


@functools.cache
def _dynamic_map() -> _Floats:
    """The signed 8-bit map of bitsandbytes: seven decades of even steps (Dettmers 2016, arXiv:1511.04561)."""
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = _linspace(2**exponent + 1)
        means = (edges[:-1] + edges[1:]) / np.float32(2)
        scale = np.float32(10.0 ** (exponent - 6))
        values += [*(scale * means).tolist(), *(-scale * means).tolist()]
    return np.sort(np.array(values, np.float32))


@functools.cache
def _nearest_table() -> NDArray[np.uint8]:
    middles = np.float32(0.5) * (_dynamic_map()[:-1] + _dynamic_map()[1:])
    places = np.float32(-1) + np.arange(65536, dtype=np.float32) * np.float32(2) / np.float32(65535)
    return np.searchsorted(middles, places).astype(np.uint8)


def _linspace(count: int) -> _Floats:
    """``torch.linspace(0.1, 1, count)``, which steps from both ends towards the middle."""
    first, last = np.float32(0.1), np.float32(1)
    # in double precision, because PyTorch multiplies and adds in one rounding
    width = np.float64((last - first) / np.float32(count - 1))
    steps = np.arange(count, dtype=np.float64)
    return np.where(steps < count // 2, first + width * steps, last - width * (count - 1 - steps)).astype(np.float32)


def _torch_sum(values: _Floats) -> np.float32:
    """``torch.sum`` on one x86 thread, in its order of summation, on which the last bits of the mean depend.

    Eight lanes (one below eight values) times four accumulators run down the values; each is summed in cascades of
    2^p, then come the rest, the sum of the four, and the sum of the lanes (PyTorch,
    aten/src/ATen/native/cpu/SumKernel.cpp). From 32768 values on PyTorch splits the sum over its threads; this is
    the result of one.
    """
    width = 8 if values.size >= 8 else 1
    lanes = values[: values.size // width * width].reshape(-1, width)
    whole = len(lanes) // 4 * 4
    four = _cascade(lanes[:whole].reshape(-1, 4 * width)).reshape(4, width)
    for row in lanes[whole:]:
        four[0] += row
    total: np.float32 = functools.reduce(
        np.add, [*values[lanes.size :], *functools.reduce(np.add, four)], np.float32(0)
    )
    return total


def _cascade(rows: _Floats) -> _Floats:
    power = max(4, (max(len(rows), 1) - 1).bit_length() // 4)
    levels = []
    for _ in range(3):
        whole = len(rows) >> power << power
        levels.append(np.add.reduce(rows[whole:], axis=0))
        rows = np.add.reduce(rows[:whole].reshape(-1, 1 << power, rows.shape[1]), axis=1)
    return functools.reduce(np.add, [*levels, np.add.reduce(rows, axis=0)])
