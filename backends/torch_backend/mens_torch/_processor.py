"""What Linux says of the processor, read without PyTorch; elsewhere it is taken for one that can do little."""

from __future__ import annotations

import functools
from pathlib import Path

__all__ = ["is_amd", "multiplies_bfloat16"]

_CPUINFO = Path("/proc/cpuinfo")


@functools.cache
def is_amd() -> bool:
    """Whether AMD made it."""
    return "AuthenticAMD" in _told()


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether oneDNN multiplies bfloat16 on it: with AVX-512, with AVX-NE-CONVERT, or by ARM's own instructions."""
    return not {"avx512vl", "avx_ne_convert", "bf16"}.isdisjoint(_told().split())


def _told() -> str:
    return _CPUINFO.read_text(encoding="utf-8") if _CPUINFO.exists() else ""
