"""Products of bfloat16 on a CPU that has no instructions for it, as most of what stands on desks.

PyTorch gives bfloat16 to oneDNN, which takes it with AVX-512 or AVX-NE-CONVERT; without them it multiplies by loops of
its own, 9 to 80 times as slow as float32. Here factors are widened to float32, which is exact, a weight by pieces that
are soon forgotten; what the sums in float32 come to is rounded once, as the instructions do it.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor as Array

from mens_torch._scratch import scratch

__all__ = ["is_widened", "wide", "widened_slope", "write_widened"]

# Rows or columns of a weight that are widened together: of 256 each call shows, of all of them the fresh pages.
_PIECE = 2048


def is_widened(tensor: Array) -> bool:
    """Whether products of it are computed here."""
    return tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu" and not _has_bfloat16()


def wide(tensor: Array) -> Array:
    """The tensor, in float32 where products of it are computed here; autograd follows."""
    return tensor.float() if is_widened(tensor) else tensor


def write_widened(out: Array, x: Array, weight: Array, bias: Array | None, scale: float | None = None) -> None:
    """Write x Wᵀ + b over ``out``; with a scale, add that much of it.

    Args:
        out: (n, out), bfloat16.
        x: (n, in), bfloat16.
        weight: (out, in), bfloat16.
        bias: (out,), bfloat16, or None.
        scale: dimensionless, or None.
    """
    if weight.shape[1] > len(weight):
        made = _room("made", out).zero_()
        for part, piece in zip(torch.split(x, _PIECE, dim=1), torch.split(weight, _PIECE, dim=1), strict=True):
            made.addmm_(_widen("x", part), _widen("weight", piece).t())
        _put(out, made, bias, scale)
        return
    rows = _widen("x", x)
    for start in range(0, len(weight), _PIECE):
        own = slice(start, start + _PIECE)
        made = torch.mm(rows, _widen("weight", weight[own]).t(), out=_room("made", out[:, own]))
        _put(out[:, own], made, None if bias is None else bias[own], scale)


def widened_slope(out: Array, entered: Array, scale: float) -> Array:
    """S · outᵀ entered, (m, k) float32, of bfloat16 (n, m) and (n, k)."""
    return torch.mm(_widen("x", out).t(), _widen("weight", entered)).mul_(scale)


def _room(use: str, like: Array) -> Array:
    """Float32 memory of that shape, its longest stretches in the same direction, that the next call gives again."""
    across = like.stride(0) == 1 and len(like) > 1
    rows = like.t() if across else like
    room = scratch(rows.numel(), torch.float32, f"widened {use}").view(rows.shape)
    return room.t() if across else room


def _widen(use: str, tensor: Array) -> Array:
    return _room(use, tensor).copy_(tensor)


def _put(place: Array, made: Array, bias: Array | None, scale: float | None) -> None:
    if bias is not None:
        made.add_(bias)
    if scale is None:
        place.copy_(made)
    else:
        place.add_(made, alpha=scale)


@functools.cache
def _has_bfloat16() -> bool:
    """Whether oneDNN multiplies bfloat16 on this processor."""
    return bool(torch._C._has_mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported())  # noqa: SLF001 (no public reader)
