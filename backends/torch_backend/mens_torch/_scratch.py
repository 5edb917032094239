"""Memory that is written over and over: a weight brought back is used at once, and then its place is free again.

Fresh memory on a CPU costs more than writing it, since each page of it faults. Every thread has a piece of its own, as
large as the largest weight it has brought back.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor as Array

__all__ = ["scratch"]

_held = threading.local()


def scratch(numel: int, dtype: torch.dtype) -> Array:
    """Memory on the CPU of which the next call in the same thread gives the same.

    Returns:
        (numel,) of type ``dtype``, contiguous, with whatever was written last.
    """
    size = numel * dtype.itemsize
    held: Array | None = getattr(_held, "memory", None)
    if held is None or held.numel() < size:
        # The old piece goes first, so that the two are never there together.
        _held.memory = None
        _held.memory = held = torch.empty(size, dtype=torch.uint8)
    return held[:size].view(dtype)
