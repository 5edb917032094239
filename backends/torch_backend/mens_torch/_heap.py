"""The heap's holes: memory that is free between what is kept, and that the system still counts as the process's."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

__all__ = ["MAPPED", "give_back_holes"]

# Bytes from which glibc gives a piece a mapping of its own, whatever it has seen (mallopt(3), M_MMAP_THRESHOLD).
MAPPED = 32 << 20


def give_back_holes() -> None:
    """Let the system have the pages of the heap that are free now; nothing where the C library cannot."""
    _trim()(0)


@functools.cache
def _trim() -> Callable[[int], object]:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, TypeError, OSError):
        # Of glibc alone: another library has no such function, and Windows opens none without a name.
        return lambda _left: None
