"""Activation functions whose values and slopes are loops of our own on a CPU, where there are enough numbers.

GELU by its tanh form (Hendrycks & Gimpel 2016, arXiv:1606.08415, section 2) in float32::

    y = x · σ(2 z),    z = √(2/π) · (x + 0.044715 x³)        since (1 + tanh z) / 2 = σ(2 z)
    y' = σ(2 z) + x · σ(2 z) · σ(-2 z) · 2 z'

The exponential is a power of two times the series of 2ʳ, |r| ≤ 1/2, which instructions of eight and more numbers
compute without a branch. In bfloat16 there are 65,536 numbers: PyTorch's own results for all of them are a table, so
values have its bits, whatever the function. SiLU in float32 is PyTorch's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor as Array
from torch import nn
from torch.nn import functional

from mens_core.compiled import MANY, compiled, in_shares, shares

__all__ = ["GELU", "Activation", "SiLU", "compile_for"]

_Function: TypeAlias = Callable[[Array], Array]
_Slope: TypeAlias = Callable[[Array, Array], Array]
_Loop: TypeAlias = Callable[..., None]

# How many times as fast one thread is as one of PyTorch's, of which more may be at work (measured: three to eight).
_AHEAD = 3
_CUBIC = np.float32(0.044715)
_TWICE = np.float32(2 * math.sqrt(2 / math.pi))
_IN_BITS = np.float32(_TWICE * math.log2(math.e))
# Beyond it the sigmoid of 2 z is zero or one in float32, while 2 z is not yet too large for a power of two.
_EDGE = np.float32(9)
# The series of 2ʳ: what is left out is below 2⁻²⁷ of it.
_SERIES = tuple(np.float32(math.log(2) ** power / math.factorial(power)) for power in range(8))
_ONE, _THREE = np.float32(1), np.float32(3)
# Where float32's exponent begins, and bfloat16's bits; half a unit of its last, and that last.
_EXPONENT, _SIXTEEN, _HALF, _LAST = np.int32(23), np.uint32(16), np.uint32(0x7FFF), np.uint32(1)
# Slopes that are looked up before they are multiplied, so that multiplying goes by whole vectors.
_TOGETHER = 2048
# Numbers behind a result that nobody uses.
_ROOM = 1024
_GELU = functools.partial(functional.gelu, approximate="tanh")
_GELU_SLOPE = functools.partial(torch.ops.aten.gelu_backward, approximate="tanh")


class Activation(nn.Module):
    """A function of each number of a tensor, in its format.

    Args:
        function: PyTorch's.
        slope: PyTorch's way back, (y's slopes, x) to x's slopes.
        loop: both in float32, (x, y's slopes or None, what is filled); None where PyTorch's are to be taken.
    """

    def __init__(self, function: _Function, slope: _Slope, loop: _Loop | None) -> None:
        super().__init__()
        self._function, self._slope, self._loop = function, slope, loop
        self._ready = False

    def forward(self, x: Array) -> Array:
        """Map a tensor of any shape."""
        if torch.is_grad_enabled() and self.has_loop(x):
            y: Array = _node(x, self)  # type: ignore[no-untyped-call]
            return y
        return self.values(x)

    def values(self, x: Array) -> Array:
        """Y, which a loop makes without a gradient."""
        return self._looped(x, None) if self.has_loop(x) else self._function(x)

    def slopes(self, grad: Array, x: Array) -> Array:
        """Those of x, given those of y."""
        return self._looped(x, grad) if self.has_loop(x) else self._slope(grad, x)

    def has_loop(self, x: Array) -> bool:
        """Whether a loop takes this; if not, PyTorch does."""
        return self._ready and self._is_worth_it(x)

    def make_ready(self, x: Array) -> None:
        """Let loops take tensors like this one from now on, if they are worth it; they are compiled now."""
        if self._is_worth_it(x):
            one = torch.zeros(1, dtype=x.dtype)
            self._looped(one, self._looped(one, None))
            self._ready = True

    def _is_worth_it(self, x: Array) -> bool:
        # The cheapest first, since a tiny batch asks as often as a large one.
        if x.numel() < MANY or not x.is_cpu:
            return False
        threads = torch.get_num_threads()
        known = x.dtype == torch.bfloat16 or (x.dtype == torch.float32 and self._loop is not None)
        return known and threads <= _AHEAD * shares(x.numel(), threads)

    def _looped(self, x: Array, grad: Array | None) -> Array:
        if x.dtype == torch.bfloat16:
            return _written(_look_up, x, grad, *_tables(self._function, self._slope))
        return _written(cast("_Loop", self._loop), x, grad)


class GELU(Activation):
    """By its tanh form."""

    def __init__(self) -> None:
        super().__init__(_GELU, _GELU_SLOPE, _gelu)


class SiLU(Activation):
    """X · sigmoid(x) (Elfwing et al. 2018, arXiv:1702.03118)."""

    def __init__(self) -> None:
        super().__init__(functional.silu, torch.ops.aten.silu_backward, None)


def compile_for(network: Any, x: Array) -> None:
    """Compile the loops of a network that will run for long: it takes a second and 120 MiB, which the plan counts.

    Args:
        network: transformers' model.
        x: as large as what will enter its activation functions, of that format and on that device.
    """
    for module in network.modules():
        if isinstance(module, Activation):
            module.make_ready(x)


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Array, activation: Activation) -> Array:
        ctx.save_for_backward(x)
        ctx.activation = activation
        return activation.values(x)

    @staticmethod
    def backward(ctx: Any, *grads: Array) -> tuple[Array, None]:
        return ctx.activation.slopes(grads[0], ctx.saved_tensors[0]), None


# Without the look for functorch's wrappers, as in _adapted.
_node = super(torch.autograd.Function, _Activation).apply


def _written(loop: _Loop, x: Array, grad: Array | None, *tables: NDArray[Any]) -> Array:
    """What a loop fills, in the shape and format of x."""
    # The heap gives a piece's place to the next of its size only if there is a little room left (measured: 30 MiB).
    out = torch.empty(x.numel() + _ROOM, dtype=x.dtype).resize_(x.shape)
    arrays = [None if tensor is None else _numbers(tensor) for tensor in (x, grad, out)]

    def write(first: int, last: int) -> None:
        parts = [None if array is None else array[first:last] for array in arrays]
        compiled(loop, in_any_order=True)(*parts, *tables)

    in_shares(write, x.numel(), 1, torch.get_num_threads())
    return out


def _numbers(tensor: Array) -> NDArray[Any]:
    """All of them in a row; numba has no bfloat16, whose bits pass as integers."""
    flat = tensor.detach().reshape(-1)
    numbers: NDArray[Any] = (flat.view(torch.uint16) if flat.dtype == torch.bfloat16 else flat).numpy()
    return numbers


@functools.cache
def _tables(function: _Function, slope: _Slope) -> tuple[NDArray[np.uint16], NDArray[np.float32]]:
    """By the bits of x: those of y, (65536,), and dy/dx, (65536,)."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    slopes = slope(torch.ones(1 << 16), every.float())
    # Of the bits that are no number some would be rounded to zero.
    slopes[slopes.isnan()] = math.nan
    return _numbers(function(every)), slopes.numpy()


def _gelu(x: NDArray[np.float32], grad: NDArray[np.float32] | None, out: NDArray[np.float32]) -> None:
    """Fill ``out`` with y, or with the slopes of x if those of y are given; see the picture above."""
    a, b, c, d, e, f, g, h = _SERIES
    for i in range(len(x)):
        above = max(x[i], -_EDGE)
        within = min(above, _EDGE)
        square = within * within
        exponent = -_IN_BITS * within * (_ONE + _CUBIC * square)
        whole = np.rint(exponent)
        r = exponent - whole
        series = a + r * (b + r * (c + r * (d + r * (e + r * (f + r * (g + r * h))))))
        bits = np.float32(series).view(np.int32) + (np.int32(whole) << _EXPONENT)
        power = np.int32(bits).view(np.float32)
        sigmoid = _ONE / (_ONE + power)
        if grad is None:
            out[i] = above * sigmoid
        else:
            steep = _TWICE * (_ONE + _THREE * _CUBIC * square)
            # The sigmoid of -2 z is a product, which keeps the digits that 1 - sigmoid would lose.
            out[i] = grad[i] * (sigmoid + within * sigmoid * power * sigmoid * steep)


def _look_up(
    x: NDArray[np.uint16],
    grad: NDArray[np.uint16] | None,
    out: NDArray[np.uint16],
    values: NDArray[np.uint16],
    slopes: NDArray[np.float32],
) -> None:
    """The same by the bits of bfloat16, for any function."""
    if grad is None:
        for i in range(len(x)):
            out[i] = values[x[i]]
    else:
        some = np.empty(_TOGETHER, np.float32)
        for start in range(0, len(x), _TOGETHER):
            entered, given = x[start : start + _TOGETHER], grad[start : start + _TOGETHER]
            room = out[start : start + _TOGETHER]
            for i in range(len(entered)):
                some[i] = slopes[entered[i]]
            for i in range(len(entered)):
                wide = np.uint32(np.uint32(given[i]) << _SIXTEEN).view(np.float32)
                bits = np.float32(some[i] * wide).view(np.uint32)
                # To the nearest, of two as near to the even one.
                room[i] = (bits + _HALF + ((bits >> _SIXTEEN) & _LAST)) >> _SIXTEEN
