"""Pages of mapped weight files: read once, they need not stay in memory beside what was made of them."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

__all__ = ["AT_ONCE", "MappedFiles"]

AT_ONCE = 64 << 20
"""Bytes of a folder's files that may be resident while each tensor is looked at or stored in NF4."""

_MAPS = Path("/proc/self/maps")


class MappedFiles:
    """The safetensors of a folder as this process has mapped them.

    Where the system does not list its mappings (outside Linux) the pages stay until it needs them.
    """

    def __init__(self, folder: Path) -> None:
        # What is listed are the files themselves, which a hub's cache only links to.
        self._names = {str(path.resolve()) for path in folder.glob("*.safetensors")}
        self._read = 0

    def was_read(self, size: int) -> None:
        """Count the bytes of a tensor that was read; now and then, let all pages go. Read again, they come back."""
        self._read += size
        if self._read < AT_ONCE:
            return
        self._read = 0
        for line in _MAPS.read_text(encoding="utf-8").splitlines() if _MAPS.exists() else []:
            place, *_, name = line.split(maxsplit=5)
            if name in self._names:
                start, stop = (int(edge, 16) for edge in place.split("-"))
                ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), mmap.MADV_DONTNEED)
