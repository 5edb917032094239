"""One tensor of the merged model: base + s · B A, block by block, and what the output's format rounds away."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from mens_core.artifacts.lora import LoraPair
from mens_core.backend import Backend

__all__ = ["TensorError", "merged_blocks"]

# Elements of a block: its float32 numbers stay in a processor's cache from one pass to the next.
_BLOCK = 1 << 19
# The largest piece of memory by which glibc's allocator learns what to keep (mallopt(3), M_MMAP_THRESHOLD).
_LARGE = 31 << 20
# Numbers of a product that OpenBLAS does in the thread that asks.
_SHORT = 1 << 12


@attrs.define(kw_only=True)
class TensorError:
    """Norms over one merged tensor, all Frobenius.

    Attributes:
        base: of W.
        update: of s · B A.
        rounding: of what was written less base + s · B A.
        changed: elements that are others than before.
        elements: of the tensor.
    """

    base: float = 0.0
    update: float = 0.0
    rounding: float = 0.0
    changed: int = 0
    elements: int = 0

    def as_dict(self) -> dict[str, Any]:
        """For the report."""
        return attrs.asdict(self) | {
            "relative_update": self.update / self.base if self.base else None,
            "relative_rounding": self.rounding / self.update if self.update else None,
        }


def merged_blocks(
    weight: NDArray[Any], pair: LoraPair, dtype: np.dtype[Any], backend: Backend, error: TensorError
) -> Iterator[Callable[[], NDArray[Any]]]:
    """The rows of a merged tensor, some at a time: the sum is there, rounding it is left to whoever takes the block.

    Args:
        weight: (out, in), in a floating-point format.
        pair: its update, in the same orientation.
        dtype: of the result.
        backend: whose ``mens_merge`` computes.
        error: all but the update's norm, complete when every block was rounded. No two may be at the same time.

    Yields:
        What rounds a block of rows, (n, in).
    """
    # Fresh memory costs more than what is done with it. glibc would give the memory of every block back to the system
    # and take it anew, page by page; it keeps pieces smaller than one that it was once asked for and that was freed.
    np.empty(_LARGE, np.uint8)
    rows = max(1, _BLOCK // max(weight.shape[1], 1))
    for start in range(0, weight.shape[0], rows):
        stored = weight[start : start + rows]
        base = stored.astype(np.float32)
        error.base = math.hypot(error.base, _norm(base))
        merged = backend.merge(base, pair.a, pair.b[start : start + rows], pair.scale)
        yield partial(_rounded, merged, stored.astype(dtype, copy=False), error)


def _rounded(merged: NDArray[np.float32], before: NDArray[Any], error: TensorError) -> NDArray[Any]:
    written = merged.astype(before.dtype, copy=False)
    error.elements += written.size
    error.changed += int(np.count_nonzero(_bits(written) != _bits(before)))
    lost = written.astype(np.float32)
    lost -= merged
    error.rounding = math.hypot(error.rounding, _norm(lost))
    return written


def _norm(rows: NDArray[np.float32]) -> float:
    """Frobenius. By products so short that BLAS, which multiplies, does not wake its threads for them."""
    numbers = rows.reshape(-1)
    whole = numbers.size // _SHORT * _SHORT
    most, rest = numbers[:whole].reshape(-1, _SHORT), numbers[whole:]
    return math.sqrt(np.vecdot(most, most).sum(dtype=np.float64) + np.vecdot(rest, rest))


def _bits(array: NDArray[Any]) -> NDArray[Any]:
    """The same numbers to compare: bfloat16's own comparison takes ten times as long as that of its bits."""
    return np.ascontiguousarray(array).view(np.dtype(f"u{array.dtype.itemsize}"))
