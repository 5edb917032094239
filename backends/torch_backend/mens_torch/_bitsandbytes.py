"""What is asked of bitsandbytes: its library, its map of 8-bit scales, and its CPU kernel, which writes where told.

bitsandbytes' public function gives a new tensor each time and runs on one core. The kernel beneath it is as fast as
memory can be written, and page faults of a new tensor cost several times as much; so it is called directly.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor as Array

from mens_core.exchange import NF4Spec
from mens_core.nf4 import CODEBOOKS

__all__ = ["dynamic_map", "library", "write_dense"]

_Kernel = Callable[[Array, Array, Array, NF4Spec], None]

_SUFFIXES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


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


def write_dense(codes: Array, absmax: Array, spec: NF4Spec, out: Array) -> None:
    """Codebook value times the block's absmax, in float32, then rounded to the format of ``out``.

    Args:
        codes: (ceil(numel / 2),) uint8, on the CPU.
        absmax: (blocks,) float32.
        spec: how the weight was stored.
        out: (numel,), contiguous, any float format; overwritten.
    """
    # The kernel takes sixteen numbers at a time under one scale.
    kernel = _kernel(spec.codebook, out.dtype) if spec.block_size % 16 == 0 else None
    (kernel or _look_up)(codes, absmax, out, spec)


@cache
def _kernel(codebook: str, dtype: torch.dtype) -> _Kernel | None:
    """Bitsandbytes' kernel, believed only after a try since it is not part of the public surface; None without one."""
    if dtype not in _SUFFIXES:
        return None
    functional = library()
    function = getattr(functional.lib, f"cdequantize_blockwise_cpu_{codebook}_{_SUFFIXES[dtype]}")

    def rows(codes: Array, absmax: Array, out: Array, size: int, count: int, width: int) -> None:
        pointers = [functional.get_ptr(array) for array in (codes, absmax, out)]
        function(*pointers, ctypes.c_longlong(size), ctypes.c_longlong(count), ctypes.c_longlong(width))

    def write(codes: Array, absmax: Array, out: Array, spec: NF4Spec) -> None:
        # It shares rows among threads and reads their scales as if each row began a block: a row is a block, then, or
        # for one thread all of them. It knows no half block but one that is a row of its own.
        size = spec.block_size
        blocks = out.numel() // size
        whole = blocks * size
        if blocks:
            count = blocks if torch.get_num_threads() > 1 else 1
            rows(codes, absmax, out, size, count, whole // count)
        if whole < out.numel():
            rows(codes[whole // 2 :], absmax[blocks:], out[whole:], size, 1, out.numel() - whole)

    return write if _agrees(write, codebook, dtype) else None


def _agrees(write: _Kernel, codebook: str, dtype: torch.dtype) -> bool:
    """Whether a kernel gives what the definition does, on every byte, two blocks and a part of one."""
    spec = NF4Spec(block_size=256, codebook=codebook)
    codes = torch.cat([torch.arange(256), torch.arange(23)]).to(torch.uint8)
    absmax = torch.tensor([0.7, 1.3, 0.02])
    found, expected = (torch.full((2 * len(codes) - 1,), torch.nan, dtype=dtype) for _ in range(2))
    _look_up(codes, absmax, expected, spec)
    try:
        write(codes, absmax, found, spec)
    except RuntimeError:
        # So bitsandbytes answers for a function that its library for this machine lacks.
        return False
    return torch.equal(found, expected)


def _look_up(codes: Array, absmax: Array, out: Array, spec: NF4Spec) -> None:
    """The definition: both values of each byte out of a table of 256 pairs, times their block's absmax."""
    values = torch.from_numpy(CODEBOOKS[spec.codebook])
    pairs = torch.stack([values.repeat_interleave(16), values.repeat(16)], dim=1)
    found = torch.nn.functional.embedding(codes.int(), pairs).reshape(-1)[: out.numel()]
    scales = absmax.repeat_interleave(spec.block_size)[: out.numel()]
    out.copy_(found * scales)
