"""One row times a weight on a CPU, as fast as memory gives the weight: a token's work is made of these.

MKL follows a weight from its first row to its last, and on AMD's processors in one thread. Memory gives more when it
is asked in four places at once, and each thread asks for itself. A weight in bfloat16 is half as much to read; its
bits, moved up by 16 places, are those of the same number in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor as Array

from mens_core.compiled import compiled, in_shares
from mens_torch._formats import rounded

__all__ = ["is_one_row", "row_product"]

# Numbers of a weight; fewer stay in a core's own cache, where it does not matter how they are asked for.
_MANY = 1 << 19
# The bits of a format's numbers, and by how many places they move up to be float32's.
_BITS = {torch.float32: (torch.uint32, 0), torch.bfloat16: (torch.uint16, 16)}


def is_one_row(x: Array, weight: Array) -> bool:
    """Whether ``row_product`` takes these, and has enough to do.

    Args:
        x: (..., in), on any device.
        weight: (out, in).
    """
    # The cheapest first: in training it ends here.
    alone = x.numel() == x.shape[-1] and weight.numel() >= _MANY
    return alone and weight.dtype == x.dtype and x.dtype in _BITS and weight.is_cpu and _is_whole(weight)


def _is_whole(weight: Array) -> bool:
    return weight.is_contiguous() or weight.t().is_contiguous()


def row_product(x: Array, weight: Array, bias: Array | None) -> Array:
    """X Wᵀ + b, summed in float32 in another order than MKL's, without a gradient.

    Args:
        x: (..., in), one row, float32 or bfloat16.
        weight: (out, in) in its format, contiguous, or its transpose is, as GPT-2's files have it.
        bias: (out,) in its format, or None.

    Returns:
        (..., out) in its format, rounded once.
    """
    out = torch.empty(*x.shape[:-1], len(weight))
    bits, places = _BITS[weight.dtype]
    write, held = (_by_rows, weight) if weight.is_contiguous() else (_by_columns, weight.t())
    row = x.detach().reshape(-1).float()
    arrays = held.detach().view(bits).numpy(), row.numpy(), out.view(-1).numpy()
    task = functools.partial(compiled(write(places), in_any_order=True), *arrays)
    in_shares(task, len(weight), len(row), torch.get_num_threads())
    return rounded(out if bias is None else out.add_(bias), x.dtype)


@functools.cache
def _by_rows(places: int) -> Callable[..., None]:
    """A loop over a weight whose bits move up by so many places, which a loop has to know when it is compiled."""

    def write(weight: NDArray[Any], row: NDArray[np.float32], out: NDArray[np.float32], first: int, last: int) -> None:
        """Fill ``out[first:last]``; the weight is (out, in)."""

        def number(bits: Any) -> Any:
            return np.uint32(np.uint32(bits) << np.uint32(places)).view(np.float32)

        quarter = (last - first) // 4
        for at in range(first, first + quarter):
            one = two = three = four = np.float32(0)
            for i in range(len(row)):
                one += number(weight[at, i]) * row[i]
                two += number(weight[at + quarter, i]) * row[i]
                three += number(weight[at + 2 * quarter, i]) * row[i]
                four += number(weight[at + 3 * quarter, i]) * row[i]
            out[at], out[at + quarter], out[at + 2 * quarter], out[at + 3 * quarter] = one, two, three, four
        for at in range(first + 4 * quarter, last):
            alone = np.float32(0)
            for i in range(len(row)):
                alone += number(weight[at, i]) * row[i]
            out[at] = alone

    return write


@functools.cache
def _by_columns(places: int) -> Callable[..., None]:
    """The same for a weight that lies the other way."""

    def write(weight: NDArray[Any], row: NDArray[np.float32], out: NDArray[np.float32], first: int, last: int) -> None:
        """Fill ``out[first:last]``; the weight is (in, out)."""

        def number(bits: Any) -> Any:
            return np.uint32(np.uint32(bits) << np.uint32(places)).view(np.float32)

        sums, quarter = out[first:last], len(row) // 4
        sums[:] = 0
        for i in range(quarter):
            one, two = weight[i, first:last], weight[i + quarter, first:last]
            three, four = weight[i + 2 * quarter, first:last], weight[i + 3 * quarter, first:last]
            a, b, c, d = row[i], row[i + quarter], row[i + 2 * quarter], row[i + 3 * quarter]
            for at in range(len(sums)):
                sums[at] += a * number(one[at]) + b * number(two[at]) + c * number(three[at]) + d * number(four[at])
        for i in range(4 * quarter, len(row)):
            last_one, a = weight[i, first:last], row[i]
            for at in range(len(sums)):
                sums[at] += a * number(last_one[at])

    return write
