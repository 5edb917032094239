"""Memory that is written over and over: what is in it is used at once, and then its place is free again.

Fresh memory on a CPU costs more than writing it, since each page of it faults, and what comes and goes leaves holes in
the heap. Every thread has a piece of its own for each use, as large as the largest it was asked for.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor as Array

__all__ = ["scratch"]

_held = threading.local()


def scratch(numel: int, dtype: torch.dtype, use: str = "weight") -> Array:
    """Memory on the CPU of which the next call in the same thread and for the same use gives the same.

    Returns:
        (numel,) of type ``dtype``, contiguous, with whatever was written last.
    """
    size = numel * dtype.itemsize
    held: Array | None = getattr(_held, use, None)
    if held is None or held.numel() < size:
        # The old piece goes first, so that the two are never there together.
        setattr(_held, use, None)
        held = torch.empty(size, dtype=torch.uint8)
        setattr(_held, use, held)
    return held[:size].view(dtype)
