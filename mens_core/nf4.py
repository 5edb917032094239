"""Storing a weight in NF4 on the host, byte for byte as bitsandbytes does (Dettmers et al. 2023, QLoRA, section 3).

::

    weight (out, in) ──▶ blocks of 64 ──▶ absmax of each block (float32, or uint8 by double quantization: nf4_scales)
                                     └──▶ codes: nearest of 16 codebook values to weight / absmax, two a byte
    weight ≈ codebook[codes] · absmax

Both backends store by this one function, so their bytes cannot differ. It is a loop over the numbers that numba
compiles when the first weight is stored: one second, and then only once for each user if a folder can be written.
"""

from __future__ import annotations

import functools
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mens_core.compiled import compiled, in_shares
from mens_core.errors import ModelError
from mens_core.exchange import NF4Spec, QuantizedWeight
from mens_core.nf4_scales import quantize_scales

__all__ = ["CODEBOOKS", "not_finite", "quantize"]

_Floats: TypeAlias = NDArray[np.float32]
_Bytes: TypeAlias = NDArray[np.uint8]

# NF4 has 16 values of which each is met by a normal weight about as often (Dettmers et al. 2023, appendix E).
_NF4 = [
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
]
# A sign, two bits of exponent and one of mantissa, divided by the largest (bitsandbytes, functional.get_4bit_type).
_FP4 = np.array([0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0], np.float32) / np.float32(12)

# A difference, because bitsandbytes' second zero has no sign either.
CODEBOOKS: dict[str, _Floats] = {"nf4": np.array(_NF4, np.float32), "fp4": np.concatenate([_FP4, 0 - _FP4])}
"""Name → (16,) float32, the value of each code."""

# bitsandbytes' floor of the absmax; it is subnormal in float32.
_TINY = np.float32(1e-38)
_ONE, _NONE = np.float32(1), np.uint8(0)
# As integers, floats without their sign are in the order of their values; infinity comes next, NaN last.
_UNSIGNED, _INFINITY = np.int32(0x7FFFFFFF), np.int32(0x7F800000)
# Numbers brought into float32 at a time, so that a weight in another format is never copied whole.
_CHUNK = 1 << 18


def quantize(weight: NDArray[Any], spec: NF4Spec, threads: int) -> QuantizedWeight:
    """Store a weight in NF4, byte for byte as ``bitsandbytes.functional.quantize_4bit`` on a CPU.

    With double quantization the mean of the scales is summed in one order on every machine, ``nf4_scales``.

    Args:
        weight: (out, in), any float format; quantised from its float32 value. Copied only if it is not contiguous.
        spec: codebook, block size, and whether the scales are quantised too.
        threads: at most so many share the work; the bytes do not depend on it.

    Raises:
        ModelError: if a value is not finite.
    """
    values = np.ascontiguousarray(weight).reshape(-1)
    blocks = -(-values.size // spec.block_size)
    codes, absmax = np.empty(-(-values.size // 2), np.uint8), np.empty(blocks, np.float32)
    store = functools.partial(_store_range, values, spec, codes, absmax)
    finite = all(in_shares(store, blocks, spec.block_size, threads))
    if not finite:
        raise not_finite(tuple(weight.shape))
    scales, nested_absmax, offset = quantize_scales(absmax) if spec.double_quant else (absmax, None, 0.0)
    return QuantizedWeight(
        codes=codes,
        absmax=scales,
        nested_absmax=nested_absmax,
        offset=float(offset),
        shape=tuple(weight.shape),
        spec=spec,
    )


def not_finite(shape: tuple[int, ...]) -> ModelError:
    """The error for a weight with an infinity or a NaN, for whoever stores it."""
    return ModelError(
        "a weight that is not finite cannot be stored in NF4",
        where=f"weight of shape {shape}",
        expected="finite numbers only",
    )


def _store_range(values: NDArray[Any], spec: NF4Spec, codes: _Bytes, absmax: _Floats, first: int, last: int) -> bool:
    """Store blocks ``first`` to ``last``; whether all of them were finite."""
    store, size = compiled(_store_blocks), spec.block_size
    middles, steps, lowest = _ladder(spec.codebook)
    stride = max(1, _CHUNK // size)
    for block in range(first, last, stride):
        stop = min(block + stride, last)
        with np.errstate(over="ignore"):
            part = values[block * size : stop * size].astype(np.float32, copy=False)
        scales, room = absmax[block:stop], codes[block * size // 2 : stop * size // 2]
        bits, peaks = part.view(np.int32), scales.view(np.int32)
        if not store(part, bits, size, middles, steps, lowest, room, scales, peaks):
            return False
    return True


@functools.cache
def _ladder(codebook: str) -> tuple[_Floats, _Bytes, np.uint8]:
    """The way through the codes from the lowest value up: middles between neighbours, steps modulo 256, first code."""
    values = CODEBOOKS[codebook]
    order = np.argsort(values, kind="stable").astype(np.uint8)
    ascending = values[order]
    return (ascending[:-1] + ascending[1:]) / np.float32(2), np.diff(order), order[0]


def _store_blocks(
    values: _Floats,
    bits: NDArray[np.int32],
    block_size: int,
    middles: _Floats,
    steps: _Bytes,
    lowest: np.uint8,
    codes: _Bytes,
    absmax: _Floats,
    peaks: NDArray[np.int32],
) -> bool:
    """Fill ``codes`` and ``absmax``; False as soon as a block is not finite.

    ``bits`` and ``peaks`` are ``values`` and ``absmax`` seen as integers. Each loop over a block is one that LLVM turns
    into vector instructions; that is why three passes over a block in the cache compare it with five middles each.
    """
    scaled, found = np.empty(block_size, np.float32), np.empty(block_size, np.uint8)
    for block in range(absmax.size):
        start = block * block_size
        size = min(block_size, values.size - start)
        peak = np.int32(0)
        for i in range(size):
            peak = max(peak, bits[start + i] & _UNSIGNED)
        if peak >= _INFINITY:
            return False
        peaks[block] = peak
        floored = max(absmax[block], _TINY)
        # bitsandbytes multiplies whole blocks by a reciprocal and divides the short one, whose absmax it also floors.
        if size == block_size:
            factor = _ONE / floored
            for i in range(size):
                scaled[i] = values[start + i] * factor
        else:
            absmax[block] = floored
            for i in range(size):
                scaled[i] = values[start + i] / floored
            # The last byte of an odd number of codes is filled up with the code of zero.
            scaled[size] = 0
            size += size % 2
        found[:] = lowest
        # A value on the middle between two codes takes the lower one.
        for k in range(0, 15, 5):
            a, b, c, d, e = middles[k], middles[k + 1], middles[k + 2], middles[k + 3], middles[k + 4]
            p, q, r, s, t = steps[k], steps[k + 1], steps[k + 2], steps[k + 3], steps[k + 4]
            for i in range(size):
                v = scaled[i]
                found[i] += (
                    (p if v > a else _NONE)
                    + (q if v > b else _NONE)
                    + (r if v > c else _NONE)
                    + (s if v > d else _NONE)
                    + (t if v > e else _NONE)
                )
        for i in range(size // 2):
            codes[start // 2 + i] = (found[2 * i] << 4) | found[2 * i + 1]
    return True
