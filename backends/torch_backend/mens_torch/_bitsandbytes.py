"""What is asked of bitsandbytes: its library and its map of 8-bit scales."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

from torch import Tensor as Array

__all__ = ["dynamic_map", "library"]


@cache
def library() -> Any:
    """``bitsandbytes.functional``."""
    # While it is imported it looks for a matrix product for AVX-512 in a package that is rarely there, and warns.
    # We multiply by the dequantised weight and use no product of its own.
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        # Imported on use: it loads native code, and a plain LoRA run needs none of it.
        import bitsandbytes.functional  # noqa: PLC0415
    finally:
        logger.setLevel(level)
    return bitsandbytes.functional


@cache
def dynamic_map(device: str) -> Array:
    """(256,) float32, the values of quantised scales."""
    values: Array = library().create_dynamic_map()
    return values.to(device)
