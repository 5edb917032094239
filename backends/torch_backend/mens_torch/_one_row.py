"""One row times a float32 weight on a CPU, as fast as memory gives the weight: a token's work is made of these.

MKL follows a weight from its first row to its last, and on AMD's processors in one thread. Memory gives more when it
is asked in four places at once, and each thread asks for itself.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor as Array

from mens_core.compiled import compiled, in_shares

__all__ = ["is_one_row", "row_product"]

# Numbers of a weight; fewer stay in a core's own cache, where it does not matter how they are asked for.
_MANY = 1 << 19


def is_one_row(x: Array, weight: Array) -> bool:
    """Whether ``row_product`` takes these, and has enough to do.

    Args:
        x: (..., in), on any device.
        weight: (out, in).
    """
    # The cheapest first: in training it ends here.
    alone = x.numel() == x.shape[-1] and weight.numel() >= _MANY
    return alone and weight.dtype == x.dtype == torch.float32 and weight.is_cpu and _is_whole(weight)


def _is_whole(weight: Array) -> bool:
    return weight.is_contiguous() or weight.t().is_contiguous()


def row_product(x: Array, weight: Array, bias: Array | None) -> Array:
    """X Wᵀ + b, summed in another order than MKL's, without a gradient.

    Args:
        x: (..., in) float32, one row.
        weight: (out, in) float32, contiguous, or its transpose is, as GPT-2's files have it.
        bias: (out,) float32 or None.

    Returns:
        (..., out) float32.
    """
    out = x.new_empty(*x.shape[:-1], len(weight))
    write, held = (_by_rows, weight) if weight.is_contiguous() else (_by_columns, weight.t())
    row = x.detach().reshape(-1)
    arrays = held.detach().numpy(), row.numpy(), out.view(-1).numpy()
    task = functools.partial(compiled(write, in_any_order=True), *arrays)
    in_shares(task, len(weight), len(row), torch.get_num_threads())
    return out if bias is None else out.add_(bias)


def _by_rows(
    weight: NDArray[np.float32], row: NDArray[np.float32], out: NDArray[np.float32], first: int, last: int
) -> None:
    """Fill ``out[first:last]``; the weight is (out, in)."""
    quarter = (last - first) // 4
    for at in range(first, first + quarter):
        one = two = three = four = np.float32(0)
        for i in range(len(row)):
            one += weight[at, i] * row[i]
            two += weight[at + quarter, i] * row[i]
            three += weight[at + 2 * quarter, i] * row[i]
            four += weight[at + 3 * quarter, i] * row[i]
        out[at], out[at + quarter], out[at + 2 * quarter], out[at + 3 * quarter] = one, two, three, four
    for at in range(first + 4 * quarter, last):
        alone = np.float32(0)
        for i in range(len(row)):
            alone += weight[at, i] * row[i]
        out[at] = alone


def _by_columns(
    weight: NDArray[np.float32], row: NDArray[np.float32], out: NDArray[np.float32], first: int, last: int
) -> None:
    """Fill ``out[first:last]``; the weight is (in, out)."""
    sums, quarter = out[first:last], len(row) // 4
    sums[:] = 0
    for i in range(quarter):
        one, two = weight[i, first:last], weight[i + quarter, first:last]
        three, four = weight[i + 2 * quarter, first:last], weight[i + 3 * quarter, first:last]
        a, b, c, d = row[i], row[i + quarter], row[i + 2 * quarter], row[i + 3 * quarter]
        for at in range(len(sums)):
            sums[at] += a * one[at] + b * two[at] + c * three[at] + d * four[at]
    for i in range(4 * quarter, len(row)):
        sums += row[i] * weight[i, first:last]
