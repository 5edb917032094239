"""4-bit storage and merging: hooks that need no session."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mens_core.backend import Backend
from mens_core.exchange import NF4Spec, QuantizedWeight
from mens_core.parity.bounds import MEAN, MERGE
from mens_core.parity.comparison import Comparison, apart, bytes_apart
from mens_core.testing.oracle import dequantize, merged, quantize

__all__ = ["compare_storage", "compare_storage_with_oracle"]

_Arrays: TypeAlias = "Sequence[NDArray[Any]]"

_SPECS = (
    NF4Spec(block_size=64, double_quant=True),
    NF4Spec(block_size=64, double_quant=False),
    NF4Spec(block_size=32, double_quant=True, codebook="fp4"),
)
_MERGES = ((13, 8, 1, 2.0), (48, 50, 4, 0.25), (64, 64, 8, 5.657))


def compare_storage(left: Backend, right: Backend) -> Iterator[Comparison]:
    """Codes, scales and read-back values of the same weights; merged weights."""
    names = (left.name, right.name)
    records = [(left.quantize(w, spec), right.quantize(w, spec)) for w in _weights() for spec in _SPECS]
    codes = [[record.codes for record in side] for side in zip(*records, strict=True)]
    yield bytes_apart("4-bit codes", (names[0], codes[0]), (names[1], codes[1]))
    yield _means_apart(names, [found for found, _ in records], [other.offset for _, other in records])
    values = [(left.dequantize(record), right.dequantize(record)) for _, record in records]
    yield bytes_apart(
        "4-bit values read back", (names[0], [found for found, _ in values]), (names[1], [other for _, other in values])
    )
    yield _merges_apart(names, [left.merge(*parts) for parts in _parts()], [right.merge(*parts) for parts in _parts()])


def compare_storage_with_oracle(backend: Backend) -> Iterator[Comparison]:
    """The same by the specification, every byte of it; of the scales' mean, which is open, the value."""
    names = (backend.name, "oracle")
    weights = [(weight, spec) for weight in _weights() for spec in _SPECS]
    found = [backend.quantize(weight, spec) for weight, spec in weights]
    expected = [
        quantize(weight, spec, offset=record.offset if spec.double_quant else None)
        for (weight, spec), record in zip(weights, found, strict=True)
    ]
    yield bytes_apart("4-bit codes and scales", (names[0], _bytes(found)), (names[1], _bytes(expected)))
    yield _means_apart(names, found, [quantize(weight, spec).offset for weight, spec in weights])
    values = [backend.dequantize(record) for record in found]
    yield bytes_apart(
        "4-bit values read back", (names[0], values), (names[1], [dequantize(record) for record in found])
    )
    yield _merges_apart(names, [backend.merge(*parts) for parts in _parts()], [merged(*parts) for parts in _parts()])


def _weights() -> list[NDArray[np.float32]]:
    """Whole blocks, short ones, an odd count, zeros, an outlier, and enough blocks for a second group of scales."""
    generator = np.random.Generator(np.random.Philox(key=3))
    shapes = [(64, 64), (48, 50), (13, 33), (5, 7), (160, 128)]
    drawn = [np.float32(0.02) * generator.standard_normal(shape, np.float32) for shape in shapes]
    outlier = drawn[0].copy()
    outlier[3, 5] = 40.0
    half_empty = drawn[1].copy()
    half_empty[:20] = 0.0
    return [*drawn, outlier, half_empty, np.zeros((4, 64), np.float32)]


def _bytes(records: Sequence[QuantizedWeight]) -> list[NDArray[Any]]:
    parts = [(record.codes, record.absmax, record.nested_absmax) for record in records]
    return [array for group in parts for array in group if array is not None]


def _means_apart(names: tuple[str, str], found: Sequence[QuantizedWeight], expected: Sequence[float]) -> Comparison:
    means = np.array([record.offset for record in found])
    sizes = np.where(np.array(expected) == 0, 1.0, np.abs(expected))
    return apart("mean of the scales", (names[0], means / sizes), (names[1], np.array(expected) / sizes), MEAN, 1.0)


def _parts() -> list[tuple[Any, Any, Any, float]]:
    """Weight (out, in), A (rank, in), B (out, rank) and scale."""
    generator = np.random.Generator(np.random.Philox(key=4))

    def drawn(*shape: int) -> NDArray[np.float32]:
        return generator.standard_normal(shape, np.float32)

    return [(drawn(out, into), drawn(rank, into), drawn(out, rank), scale) for out, into, rank, scale in _MERGES]


def _merges_apart(names: tuple[str, str], found: _Arrays, expected: _Arrays) -> Comparison:
    """All entries of all weights, each in multiples of its weight's largest entry."""
    sizes = [float(np.abs(array).max()) for array in expected]
    flat = [
        np.concatenate([array.reshape(-1) / size for array, size in zip(arrays, sizes, strict=True)])
        for arrays in (found, expected)
    ]
    return apart("merged weights W + s·BA", (names[0], flat[0]), (names[1], flat[1]), MERGE, 1.0)
