"""Products of float32 matrices on a CPU, by oneDNN where MKL holds back.

PyTorch gives float32 to Intel's MKL, which runs its AVX-512 kernels on Intel's processors alone, and bfloat16 to
oneDNN, which goes by what the processor can do. On AMD's Zen 5 a product of float32 takes oneDNN half of MKL's time.
Both round alike: to float32, after sums in float32.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path

import torch
from torch import Tensor as Array
from torch.nn import functional

__all__ = ["linear", "linear_into", "product"]

# Multiplications from which oneDNN is not slower; below, what it prepares for each call shows.
_MANY = 1 << 20
# oneDNN writes where it likes; what has its place is made in so many columns at a time and copied while in the cache.
_COLUMNS = 4096
_CPUINFO = Path("/proc/cpuinfo")


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """X Wᵀ + b, without a gradient.

    Args:
        x: (..., in).
        weight: (out, in), in the format of x.
        bias: (out,) or None.

    Returns:
        (..., out).
    """
    if _held_back() and _is_large(x, weight):
        made: Array = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # noqa: SLF001
        return made
    return functional.linear(x, weight, bias)


def linear_into(out: Array, x: Array, weight: Array) -> Array:
    """Write x Wᵀ over ``out``, (n, out), from (n, in) and (out, in); returns it."""
    if not (_held_back() and _is_large(x, weight)):
        return torch.mm(x, weight.t(), out=out)
    for part, rows in zip(torch.split(out, _COLUMNS, dim=1), torch.split(weight, _COLUMNS), strict=True):
        part.copy_(linear(x, rows))
    return out


def product(left: Array, right: Array) -> Array:
    """(n, k) times (k, m), without a gradient."""
    return linear(left, right.t())


def _is_large(x: Array, weight: Array) -> bool:
    on_cpu = x.dtype == torch.float32 and x.device.type == "cpu"
    return on_cpu and math.prod(x.shape) * weight.shape[0] >= _MANY


@functools.cache
def _held_back() -> bool:
    """Whether this processor has AVX-512 that MKL does not use, and this PyTorch another way to it."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch._C._has_mkldnn:  # noqa: SLF001
        return False
    return _CPUINFO.exists() and "AuthenticAMD" in _CPUINFO.read_text(encoding="utf-8")
