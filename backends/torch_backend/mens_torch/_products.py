"""Products of matrices on a CPU, by others than PyTorch's own where those hold back.

PyTorch gives float32 to Intel's MKL, which runs its AVX-512 kernels on Intel's processors alone, and bfloat16 to
oneDNN, which goes by what the processor can do. On AMD's Zen 5 a product of float32 takes oneDNN half of MKL's time.
Both round alike: to float32, after sums in float32.

oneDNN keeps half a megabyte for each shape it has seen, scattered over the heap, and a batch's tokens are hardly ever
as many as another's. So it gets rows by the piece, of few sizes; what is left, fewer than the smallest, is MKL's.

bfloat16 where the processor has no products of it is ``_widened``'s. One row by itself, of that or of float32 on any of
AMD's processors, is ``_one_row``'s.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor as Array
from torch.nn import functional

from mens_torch._formats import rounded
from mens_torch._one_row import is_one_row, row_product
from mens_torch._processor import is_amd
from mens_torch._widened import is_widened, widened_slope, write_widened

__all__ = ["add_update", "linear", "linear_into", "product", "slope"]

# Multiplications from which oneDNN is not slower; below, what it prepares for each call shows.
_MANY = 1 << 20
# The rows of a piece: every call packs the whole weight, which 64 rows repay and 512 hardly notice.
_ROWS = (512, 256, 128, 64)
# oneDNN writes where it likes; so many columns at a time are still in the cache when they are copied to their place.
_COLUMNS = 4096

_Writer = Callable[..., None]


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """X Wᵀ + b, without a gradient.

    Args:
        x: (..., in).
        weight: (out, in), in the format of x.
        bias: (out,) or None.

    Returns:
        (..., out).
    """
    if is_one_row(x, weight) and (is_widened(x) if x.dtype == torch.bfloat16 else is_amd()):
        return row_product(x, weight, bias)
    write = None if _is_short(x, weight) else _writer(x, len(weight))
    if write is None:
        return functional.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    out = x.new_empty(len(rows), len(weight))
    write(out, rows, weight, bias)
    return out.view(*x.shape[:-1], len(weight))


def linear_into(out: Array, x: Array, weight: Array) -> Array:
    """Write x Wᵀ over ``out``, (n, out), from (n, in) and (out, in); returns it."""
    write = _writer(x, len(weight))
    if write is None:
        return torch.mm(x, weight.t(), out=out)
    write(out, x, weight, None)
    return out


def product(left: Array, right: Array, out: Array | None = None) -> Array:
    """(n, k) (k, m), without a gradient; k and m are a weight's, n is any.

    Args:
        left: (n, k).
        right: (k, m), in its format.
        out: (n, m) to add it to, which is then returned.
    """
    write = _writer(left, right.shape[1])
    if out is None:
        return torch.mm(left, right) if write is None else linear(left, right.t())
    if write is None:
        return out.addmm_(left, right)
    write(out, left, right.t(), None, 1.0)
    return out


def add_update(out: Array, left: Array, right: Array, scale: float) -> None:
    """Add s · left right, of (n, R) and (R, m), to (n, m): so short an inner length gains nothing from oneDNN."""
    if is_widened(left) and not _is_short(left, right.t()):
        write_widened(out, left, right.t(), None, scale)
    else:
        out.addmm_(left, right, alpha=scale)


def slope(out: Array, entered: Array, scale: float) -> Array:
    """S · outᵀ entered, (m, k) float32 of (n, m) and (n, k); multiplied before it is rounded to their format."""
    if is_widened(out):
        return widened_slope(out, entered, scale)
    # With beta 0 the first is read for its format alone.
    return rounded(torch.addmm(out.new_empty(()), out.t(), entered, beta=0, alpha=scale), torch.float32)


def _writer(x: Array, out: int) -> _Writer | None:
    """What multiplies x by a weight of so many outputs; None for PyTorch's own products."""
    if _goes_to_onednn(x, out):
        return _write_by_onednn
    return write_widened if is_widened(x) else None


def _is_short(x: Array, weight: Array) -> bool:
    """Whether it is one row and a weight that PyTorch's own loop reads as it lies, in bfloat16 too."""
    return x.numel() == x.shape[-1] and weight.is_contiguous()


def _goes_to_onednn(x: Array, out: int) -> bool:
    size = x.numel()
    # The cheapest first: a token at a time has too few rows for a piece.
    enough = size >= _ROWS[-1] * x.shape[-1] and size * out >= _MANY
    return enough and x.dtype == torch.float32 and x.device.type == "cpu" and _held_back()


def _write_by_onednn(out: Array, x: Array, weight: Array, bias: Array | None, scale: float | None = None) -> None:
    """As ``write_widened``, of float32."""
    done = 0
    for rows in _pieces(len(x), weight.numel()):
        for start in range(0, len(weight), _COLUMNS):
            columns = slice(start, start + _COLUMNS)
            made = _by_onednn(x[done : done + rows], weight[columns], None if bias is None else bias[columns])
            place = out[done : done + rows, columns]
            place.copy_(made) if scale is None else place.add_(made, alpha=scale)
        done += rows
    if done == len(x):
        return
    if scale is not None:
        out[done:].addmm_(x[done:], weight.t(), alpha=scale)
    elif bias is None:
        torch.mm(x[done:], weight.t(), out=out[done:])
    else:
        torch.addmm(bias, x[done:], weight.t(), out=out[done:])


def _pieces(rows: int, each: int) -> Iterator[int]:
    """The sizes of oneDNN's pieces, the largest first, of that many multiplications a row."""
    for size in _ROWS:
        if size * each >= _MANY:
            yield from [size] * (rows // size)
            rows %= size


def _by_onednn(x: Array, weight: Array, bias: Array | None) -> Array:
    made: Array = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # noqa: SLF001
    return made


@functools.cache
def _held_back() -> bool:
    """Whether this processor has AVX-512 that MKL does not use, and this PyTorch another way to it."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch._C._has_mkldnn:  # noqa: SLF001
        return False
    return is_amd()
