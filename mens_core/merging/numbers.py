"""One tensor of the merged model: base + s · B A, block by block, and what the output's format rounds away."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from mens_core.artifacts.lora import LoraPair
from mens_core.backend import Backend
from mens_core.machine import processors

__all__ = ["TensorError", "merged_blocks"]

# Elements of a block: its float32 numbers stay in a processor's cache from one pass to the next.
_BLOCK = 1 << 19
# The largest piece of memory by which glibc's allocator learns what to keep (mallopt(3), M_MMAP_THRESHOLD).
_LARGE = 31 << 20


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
) -> Iterator[NDArray[Any]]:
    """The rows of a merged tensor, some at a time.

    Args:
        weight: (out, in), in a floating-point format.
        pair: its update, in the same orientation.
        dtype: of the result.
        backend: whose ``mens_merge`` computes.
        error: all but the update's norm, complete when the last block was taken.

    Yields:
        Blocks of rows, (n, in).
    """
    rows = max(1, _BLOCK // max(weight.shape[1], 1))
    starts = range(0, weight.shape[0], rows)
    # One block is added up while the one before is rounded; a processor that has both to do takes one after the other,
    # so that the block is still in its cache.
    behind_by = 0 if processors() == 1 else 1
    # Fresh memory costs more than what is done with it. glibc would give the memory of every block back to the system
    # and take it anew, page by page; it keeps pieces smaller than one that it was once asked for and that was freed.
    np.empty(_LARGE, np.uint8)
    bases = np.empty((behind_by + 1, min(rows, weight.shape[0]), weight.shape[1]), np.float32)
    losses, differ = np.empty_like(bases[0]), np.empty(bases[0].shape, np.bool_)
    squares = np.zeros(2)

    def rounded(stored: NDArray[Any], base: NDArray[np.float32], merged: NDArray[np.float32]) -> NDArray[Any]:
        written, lost, other = merged.astype(dtype, copy=False), losses[: len(stored)], differ[: len(stored)]
        np.not_equal(_bits(written), _bits(stored.astype(dtype, copy=False)), out=other)
        error.changed += int(np.count_nonzero(other))
        lost[:] = written
        lost -= merged
        squares[:] += _square(base), _square(lost)
        return written

    with ThreadPoolExecutor(1, thread_name_prefix="mens-round") as behind:
        waiting: deque[Future[NDArray[Any]]] = deque()
        for start, room in zip(starts, itertools.cycle(bases)):
            if len(waiting) > behind_by:
                yield waiting.popleft().result()
            stored = weight[start : start + rows]
            base = room[: len(stored)]
            base[:] = stored
            merged = backend.merge(base, pair.a, pair.b[start : start + rows], pair.scale)
            waiting.append(behind.submit(rounded, stored, base, merged))
        for last in waiting:
            yield last.result()
    error.elements = weight.size
    error.base, error.rounding = map(math.sqrt, squares)


def _square(scratch: NDArray[np.float32]) -> float:
    """Of the norm; the numbers are lost. Not by BLAS, whose threads wait for each other over so little."""
    return float(np.square(scratch, out=scratch).sum())


def _bits(array: NDArray[Any]) -> NDArray[Any]:
    """The same numbers to compare: bfloat16's own comparison takes ten times as long as that of its bits."""
    return np.ascontiguousarray(array).view(np.dtype(f"u{array.dtype.itemsize}"))
