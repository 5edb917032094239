"""Rounding to a number format, where it is another: PyTorch takes two microseconds to see that it is not."""

from __future__ import annotations

import torch
from torch import Tensor as Array

__all__ = ["rounded"]


def rounded(tensor: Array, dtype: torch.dtype) -> Array:
    """The tensor itself if it has this format, as ``tensor.to(dtype)`` has it."""
    # A tiny model's step asks 160 times, which was 3 % of its time.
    return tensor if tensor.dtype == dtype else tensor.to(dtype)
