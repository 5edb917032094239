"""Products of float32 matrices on a CPU, by oneDNN where MKL holds back.

PyTorch gives float32 to Intel's MKL, which runs its AVX-512 kernels on Intel's processors alone, and bfloat16 to
oneDNN, which goes by what the processor can do. On AMD's Zen 5 a product of float32 takes oneDNN half of MKL's time.
Both round alike: to float32, after sums in float32.
"""

from __future__ import annotations

import functools
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
    if _goes_to_onednn(x, weight.shape[0]):
        return _by_onednn(x, weight, bias)
    return functional.linear(x, weight, bias)


def linear_into(out: Array, x: Array, weight: Array) -> Array:
    """Write x Wᵀ over ``out``, (n, out), from (n, in) and (out, in); returns it."""
    if not _goes_to_onednn(x, weight.shape[0]):
        return torch.mm(x, weight.t(), out=out)
    for part, rows in zip(torch.split(out, _COLUMNS, dim=1), torch.split(weight, _COLUMNS), strict=True):
        part.copy_(_by_onednn(x, rows))
    return out


def product(left: Array, right: Array, scale: float = 1.0) -> Array:
    """S · (n, k) (k, m), without a gradient; what is summed up is multiplied before it is rounded to bfloat16."""
    if _goes_to_onednn(left, right.shape[1]):
        made = _by_onednn(left, right.t())
        return made if scale == 1.0 else made.mul_(scale)
    if scale == 1.0:
        return torch.mm(left, right)
    # With beta 0 the first is read for its format alone.
    return torch.addmm(left.new_empty(()), left, right, beta=0, alpha=scale)


def _goes_to_onednn(x: Array, out: int) -> bool:
    return x.dtype == torch.float32 and x.numel() * out >= _MANY and x.device.type == "cpu" and _held_back()


def _by_onednn(x: Array, weight: Array, bias: Array | None = None) -> Array:
    made: Array = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # noqa: SLF001
    return made


@functools.cache
def _held_back() -> bool:
    """Whether this processor has AVX-512 that MKL does not use, and this PyTorch another way to it."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch._C._has_mkldnn:  # noqa: SLF001
        return False
    return _CPUINFO.exists() and "AuthenticAMD" in _CPUINFO.read_text(encoding="utf-8")
