"""Products of matrices on a CPU, by others than PyTorch's own where those hold back.

PyTorch gives float32 to Intel's MKL, which runs its AVX-512 kernels on Intel's processors alone, and bfloat16 to
oneDNN, which goes by what the processor can do. On AMD's Zen 5 a product of float32 takes oneDNN half of MKL's time.
Both round alike: to float32, after sums in float32.

oneDNN keeps half a megabyte for each shape it has seen, scattered over the heap, and a batch's tokens are hardly ever
as many as another's. So it gets rows by the piece, of few sizes; what is left, fewer than the smallest, is MKL's.

bfloat16 where the processor has no products of it is ``_widened``'s. Which way is taken depends on a format and a
device, so a layer asks once for all that it multiplies. One row by itself, of bfloat16 without instructions or of
float32 on any of AMD's processors, is ``_one_row``'s; no step of training asks for it.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor as Array
from torch.nn import functional

from mens_torch._formats import rounded
from mens_torch._one_row import is_one_row, row_product
from mens_torch._processor import is_amd
from mens_torch._widened import is_widened, widened_slope, write_widened

__all__ = ["Products", "linear", "products"]

# Multiplications from which oneDNN is not slower; below, what it prepares for each call shows.
_MANY = 1 << 20
# The rows of a piece: every call packs the whole weight, which 64 rows repay and 512 hardly notice.
_ROWS = (512, 256, 128, 64)
# oneDNN writes where it likes; so many columns at a time are still in the cache when they are copied to their place.
_COLUMNS = 4096


class Products:
    """Products without a gradient, by PyTorch's own."""

    def linear(self, x: Array, weight: Array, bias: Array | None = None) -> Array:
        """X Wᵀ + b.

        Args:
            x: (..., in).
            weight: (out, in), in the format of x.
            bias: (out,) or None.

        Returns:
            (..., out).
        """
        return functional.linear(x, weight, bias)

    def linear_into(self, out: Array, x: Array, weight: Array) -> Array:
        """Write x Wᵀ over ``out``, (n, out), from (n, in) and (out, in); returns it."""
        return torch.mm(x, weight.t(), out=out)

    def product(self, left: Array, right: Array, out: Array | None = None) -> Array:
        """(n, k) (k, m); k and m are a weight's, n is any.

        Args:
            left: (n, k).
            right: (k, m), in its format.
            out: (n, m) to add it to, which is then returned.
        """
        return torch.mm(left, right) if out is None else out.addmm_(left, right)

    def add_update(self, out: Array, left: Array, right: Array, scale: float) -> None:
        """Add s · left right, of (n, R) and (R, m), to (n, m)."""
        out.addmm_(left, right, alpha=scale)

    def slope(self, out: Array, entered: Array, scale: float) -> Array:
        """S · outᵀ entered, (m, k) float32 of (n, m) and (n, k); multiplied before it is rounded to their format."""
        # With beta 0 the first is read for its format alone.
        made = torch.addmm(_nothing(out.dtype, out.device), out.t(), entered, beta=0, alpha=scale)
        return rounded(made, torch.float32)


class _Written(Products, ABC):
    """Products that are written into memory which is there, by a way that may be left for small ones."""

    @abstractmethod
    def _write(self, out: Array, x: Array, weight: Array, bias: Array | None, scale: float | None = None) -> None:
        """As ``write_widened``."""

    def _takes(self, x: Array, out: int) -> bool:
        """Whether x is multiplied so by a weight of so many outputs."""
        del x, out
        return True

    def linear(self, x: Array, weight: Array, bias: Array | None = None) -> Array:
        if not self._takes(x, len(weight)):
            return super().linear(x, weight, bias)
        rows = x.reshape(-1, x.shape[-1])
        out = x.new_empty(len(rows), len(weight))
        self._write(out, rows, weight, bias)
        return out.view(*x.shape[:-1], len(weight))

    def linear_into(self, out: Array, x: Array, weight: Array) -> Array:
        if not self._takes(x, len(weight)):
            return super().linear_into(out, x, weight)
        self._write(out, x, weight, None)
        return out

    def product(self, left: Array, right: Array, out: Array | None = None) -> Array:
        if not self._takes(left, right.shape[1]):
            return super().product(left, right, out)
        if out is None:
            return self.linear(left, right.t())
        self._write(out, left, right.t(), None, 1.0)
        return out


class _ByOneDNN(_Written):
    """Of float32, for which updates and slopes are left as they are: so short an inner length gains nothing from it."""

    def _takes(self, x: Array, out: int) -> bool:
        size = x.numel()
        return size >= _ROWS[-1] * x.shape[-1] and size * out >= _MANY

    def _write(self, out: Array, x: Array, weight: Array, bias: Array | None, scale: float | None = None) -> None:
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


class _Widened(_Written):
    """Of bfloat16, by float32 in all but one row and a weight that PyTorch's own loop reads as it lies."""

    def linear(self, x: Array, weight: Array, bias: Array | None = None) -> Array:
        return functional.linear(x, weight, bias) if _is_short(x, weight) else super().linear(x, weight, bias)

    def add_update(self, out: Array, left: Array, right: Array, scale: float) -> None:
        if _is_short(left, right.t()):
            super().add_update(out, left, right, scale)
        else:
            write_widened(out, left, right.t(), None, scale)

    def slope(self, out: Array, entered: Array, scale: float) -> Array:
        return widened_slope(out, entered, scale)

    def _write(self, out: Array, x: Array, weight: Array, bias: Array | None, scale: float | None = None) -> None:
        write_widened(out, x, weight, bias, scale)


def products(x: Array) -> Products:
    """Those of tensors that have the format of x and are where it is."""
    if x.dtype == torch.float32:
        return _BY_ONEDNN if x.is_cpu and _held_back() else _OWN
    return _WIDENED if is_widened(x) else _OWN


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """X Wᵀ + b as ``Products.linear``, of which one row is summed in another order where that is faster."""
    if is_one_row(x, weight) and (is_amd() if x.dtype == torch.float32 else is_widened(x)):
        return row_product(x, weight, bias)
    return products(x).linear(x, weight, bias)


@functools.cache
def _nothing(dtype: torch.dtype, device: torch.device) -> Array:
    return torch.zeros((), dtype=dtype, device=device)


def _is_short(x: Array, weight: Array) -> bool:
    """Whether it is one row and a weight that PyTorch's own loop reads as it lies, in bfloat16 too."""
    return x.numel() == x.shape[-1] and weight.is_contiguous()


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


_OWN, _BY_ONEDNN, _WIDENED = Products(), _ByOneDNN(), _Widened()
