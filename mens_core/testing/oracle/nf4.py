"""4-bit storage (Dettmers et al. 2023, QLoRA, section 3 and appendix E), byte for byte as bitsandbytes holds it.

The bytes are defined by float32 arithmetic, so this is the one file that computes in float32. The single number that
the definition leaves open is the mean of the scales, whose last bits depend on the order in which a library sums: the
exactly rounded mean stands here, and ``quantize`` takes another's mean so that every other byte can be compared.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from mens_core.errors import ModelError
from mens_core.exchange import NF4Spec, QuantizedWeight

__all__ = ["CODEBOOKS", "NESTED_BLOCK", "dequantize", "dynamic_map", "quantize"]

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

# Quantiles of a normal distribution (appendix E).
_NF4 = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0],
    np.float32,
)  # fmt: skip
# A sign, two bits of exponent and one of mantissa, as bitsandbytes scales them.
_FP4_MAGNITUDES = np.array([0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0]) / 12.0

CODEBOOKS: dict[str, Floats] = {
    "nf4": _NF4,
    # A difference, because bitsandbytes' second zero has no sign.
    "fp4": np.concatenate([_FP4_MAGNITUDES, 0.0 - _FP4_MAGNITUDES]).astype(np.float32),
}
"""The 16 values by code."""

NESTED_BLOCK = 256
"""Scales that share a scale of their own; fixed by bitsandbytes."""

_TINY = np.float32(1e-38)  # bitsandbytes' floor of an absmax it divides by


def quantize(weight: Floats, spec: NF4Spec, *, offset: float | None = None) -> QuantizedWeight:
    """``mens_quantize``: blocks of row-major weights, each with its absmax and its nearest codes.

    Args:
        weight: (out, in) float32.
        spec: block size, codebook, and whether the scales are quantised too.
        offset: the mean to subtract from the scales, for spec.double_quant; None for the exactly rounded one.

    Raises:
        ModelError: if a value is not finite.
    """
    if not np.isfinite(weight).all():
        raise ModelError("a weight that is not finite cannot be stored in NF4", where=f"shape {weight.shape}")
    codes, absmax = _blocks(weight, spec)
    if not spec.double_quant:
        return QuantizedWeight(
            codes=codes, absmax=absmax, nested_absmax=None, offset=0.0, shape=weight.shape, spec=spec
        )
    mean = np.float32(absmax.mean(dtype=np.float64) if offset is None else offset)
    indices, nested = _nested(absmax - mean)
    return QuantizedWeight(
        codes=codes, absmax=indices, nested_absmax=nested, offset=float(mean), shape=weight.shape, spec=spec
    )


def dequantize(quantized: QuantizedWeight) -> Floats:
    """``mens_dequantize``: codebook value times absmax, itself a map's value times its own scale plus the mean."""
    absmax = quantized.absmax.astype(np.float32)
    if quantized.nested_absmax is not None:
        scales = np.repeat(quantized.nested_absmax, NESTED_BLOCK)[: absmax.size]
        absmax = dynamic_map()[quantized.absmax] * scales + np.float32(quantized.offset)
    size, spec = int(np.prod(quantized.shape)), quantized.spec
    nibbles = np.stack([quantized.codes >> 4, quantized.codes & 15], axis=1).reshape(-1)[:size]
    values = CODEBOOKS[spec.codebook][nibbles] * np.repeat(absmax, spec.block_size)[:size]
    return values.reshape(quantized.shape)


def _blocks(weight: Floats, spec: NF4Spec) -> tuple[Bytes, Floats]:
    """Codes, two a byte and the earlier one high, and the absmax of each block; the last block may be short."""
    block_size, codebook = spec.block_size, CODEBOOKS[spec.codebook]
    starts = np.arange(0, weight.size, block_size)
    flat = weight.astype(np.float32).reshape(-1)
    absmax = np.maximum.reduceat(np.abs(flat), starts)
    short = weight.size % block_size
    # bitsandbytes multiplies whole blocks by a reciprocal and divides the short one, whose absmax it also floors.
    if short:
        absmax[-1] = max(absmax[-1], _TINY)
    reciprocal = np.float32(1) / np.maximum(absmax, _TINY)
    scaled = flat * np.repeat(reciprocal, block_size)[: flat.size]
    if short:
        scaled[-short:] = flat[-short:] / absmax[-1]
    # Code 0.0 fills a last byte up.
    codes = _nearest(np.append(scaled, np.zeros(flat.size % 2, np.float32)), codebook)
    return (codes[::2] << np.uint8(4)) | codes[1::2], absmax


def _nearest(values: Floats, codebook: Floats) -> Bytes:
    """The code of the nearest value; one on the middle between two goes to the lower value."""
    order = np.argsort(codebook, kind="stable")
    rising = codebook[order]
    middles = (rising[:-1] + rising[1:]) / np.float32(2)
    return order[np.searchsorted(middles, values, side="left")].astype(np.uint8)


def _nested(centred: Floats) -> tuple[Bytes, Floats]:
    """8-bit indices into the dynamic map, and the absmax of each group of 256."""
    groups = np.pad(centred, (0, -centred.size % NESTED_BLOCK)).reshape(-1, NESTED_BLOCK)
    nested = np.abs(groups).max(axis=1)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        unit = groups * (np.float32(1) / nested)[:, None]
    unit = np.clip(np.nan_to_num(unit, nan=0.0), -1, 1)
    # bitsandbytes has the nearest entry in a table of 65536 places over -1 … 1; place and entry round as its C code.
    halved = ((unit + np.float32(1)) * np.float32(0.5)).astype(np.float64)
    places = (halved * 65535 + 0.5).astype(np.float32).astype(np.uint16)
    places[nested == 0] = 0
    return _entries()[places].reshape(-1)[: centred.size], nested


@cache
def _entries() -> Bytes:
    """The nearest entry of the dynamic map at each of the 65536 places."""
    entries = dynamic_map()
    middles = np.float32(0.5) * (entries[:-1] + entries[1:])
    places = np.float32(-1) + np.arange(65536, dtype=np.float32) * np.float32(2) / np.float32(65535)
    return np.searchsorted(middles, places).astype(np.uint8)


@cache
def dynamic_map() -> Floats:
    """Bitsandbytes' signed 8-bit map: 0, 1 and, for each of seven decades, the middles of 2^k even steps, both signs.

    (Dettmers 2016, arXiv:1511.04561, dynamic tree quantization.)
    """
    positive = [np.float32(10.0**-decade) * _middles(2 ** (6 - decade) + 1) for decade in range(7)]
    magnitudes = np.concatenate(positive)
    return np.sort(np.concatenate([magnitudes, -magnitudes, np.array([0, 1], np.float32)]))


def _middles(count: int) -> Floats:
    """The middles between ``count`` numbers from 0.1 to 1, which PyTorch's ``linspace`` counts from both ends."""
    low, high = np.float32(0.1), np.float32(1)
    step = float(np.float32((high - low) / np.float32(count - 1)))
    place = np.arange(count)
    edges = np.where(2 * place < count - 1, low + step * place, high - step * (count - 1 - place)).astype(np.float32)
    return (edges[:-1] + edges[1:]) / np.float32(2)
