"""One tensor of the merged model: base + s · B A, block by block, and what the output's format rounds away."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from mens_core.artifacts.lora import LoraPair
from mens_core.artifacts.norms import update_norm
from mens_core.backend import Backend

__all__ = ["TensorError", "merged_blocks"]

# Elements of a block: its float32 numbers stay in a processor's cache from one pass to the next.
_BLOCK = 1 << 19


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
        error: the norms, complete when the last block was taken.

    Yields:
        Blocks of rows, (n, in).
    """
    rows = max(1, _BLOCK // max(weight.shape[1], 1))
    squares = np.zeros(2)
    # Fresh memory costs more than what is done with it.
    bases, losses = np.empty((2, min(rows, weight.shape[0]), weight.shape[1]), np.float32)
    for start in range(0, weight.shape[0], rows):
        stored = weight[start : start + rows]
        base, lost = bases[: len(stored)], losses[: len(stored)]
        base[:] = stored
        merged = backend.merge(base, pair.a, pair.b[start : start + rows], pair.scale)
        written = merged.astype(dtype, copy=False)
        error.changed += int(np.count_nonzero(_bits(written) != _bits(stored.astype(dtype, copy=False))))
        lost[:] = written
        lost -= merged
        squares += float(np.vdot(base, base)), float(np.vdot(lost, lost))
        yield written
    error.elements = weight.size
    error.base, error.rounding = map(math.sqrt, squares)
    error.update = update_norm(pair)


def _bits(array: NDArray[Any]) -> NDArray[Any]:
    """The same numbers to compare: bfloat16's own comparison takes ten times as long as that of its bits."""
    return np.ascontiguousarray(array).view(np.dtype(f"u{array.dtype.itemsize}"))
