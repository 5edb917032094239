"""Double quantization: the scales of NF4 in 8 bits, as bitsandbytes stores them (Dettmers et al. 2023, section 3).

::

    absmax (blocks,) ──▶ less their mean ──▶ groups of 256 ──▶ absmax of each group, float32
                                                          └──▶ nearest of the 256 values of the dynamic map, uint8
    absmax ≈ map[indices] · group's absmax + mean
"""

from __future__ import annotations

import functools
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["NESTED_BLOCK", "dynamic_map", "quantize_scales"]

_Floats: TypeAlias = NDArray[np.float32]

NESTED_BLOCK = 256
"""Scales that share a scale; fixed by bitsandbytes."""


def quantize_scales(absmax: _Floats) -> tuple[NDArray[np.uint8], _Floats, np.float32]:
    """Store scales in 8 bits, byte for byte as ``bitsandbytes.functional.quantize_blockwise`` on a CPU.

    Args:
        absmax: (blocks,) float32, none negative, at least one.

    Returns:
        (blocks,) uint8, indices into the dynamic map; (ceil(blocks / 256),) float32, the scale of each group; and the
        mean that was subtracted.
    """
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        offset = np.float32(_sum(absmax) / np.float32(absmax.size))
        centred = absmax - offset
        groups = np.pad(centred, (0, -centred.size % NESTED_BLOCK)).reshape(-1, NESTED_BLOCK)
        nested = np.abs(groups).max(axis=1)
        unit = np.clip(groups * (np.float32(1) / nested)[:, None], -1, 1)
    # bitsandbytes looks the nearest map entry up in a table of 65536 places; place and value as its C code rounds.
    halved = ((unit + np.float32(1)) * np.float32(0.5)).astype(np.float64)
    places = np.nan_to_num((halved * 65535 + 0.5).astype(np.float32), nan=0.0).astype(np.uint16)
    places[nested == 0] = 0
    return _nearest_table()[places].reshape(-1)[: absmax.size], nested, offset


@functools.cache
def dynamic_map() -> _Floats:
    """(256,) float32, ascending: seven decades of even steps either side of zero (Dettmers 2016, arXiv:1511.04561)."""
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = _linspace(2**exponent + 1)
        means = (edges[:-1] + edges[1:]) / np.float32(2)
        scale = np.float32(10.0 ** (exponent - 6))
        values += [*(scale * means).tolist(), *(-scale * means).tolist()]
    return np.sort(np.array(values, np.float32))


@functools.cache
def _nearest_table() -> NDArray[np.uint8]:
    middles = np.float32(0.5) * (dynamic_map()[:-1] + dynamic_map()[1:])
    places = np.float32(-1) + np.arange(65536, dtype=np.float32) * np.float32(2) / np.float32(65535)
    return np.searchsorted(middles, places).astype(np.uint8)


def _linspace(count: int) -> _Floats:
    """``torch.linspace(0.1, 1, count)``, which steps from both ends towards the middle."""
    first, last = np.float32(0.1), np.float32(1)
    # in double precision, because PyTorch multiplies and adds in one rounding
    width = np.float64((last - first) / np.float32(count - 1))
    steps = np.arange(count, dtype=np.float64)
    return np.where(steps < count // 2, first + width * steps, last - width * (count - 1 - steps)).astype(np.float32)


def _sum(values: _Floats) -> np.float32:
    """The sum in the order of ``torch.sum`` on one x86 thread, on which the last bits of the mean depend.

    Eight lanes (one below eight values) times four accumulators run down the values; each is summed in cascades of
    2^p, then come the rest, the sum of the four, and the sum of the lanes (PyTorch,
    aten/src/ATen/native/cpu/SumKernel.cpp). On other processors, and from 32768 values on over its threads, PyTorch's
    order is another one and its sum may differ by a few roundings; this one is the same everywhere.
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
