"""NF4 storage of a frozen weight, by bitsandbytes (Dettmers et al. 2023, QLoRA, section 3).

::

    weight (out, in) ──▶ blocks of 64 ──▶ absmax of each block (float32, or uint8 by double quantization)
                                     └──▶ codes: nearest of 16 codebook values to weight / absmax, two a byte
    weight ≈ codebook[codes] · absmax
"""

from __future__ import annotations

import logging
import math
from functools import cache
from typing import Any

import attrs
import torch
from torch import Tensor as Array

from mens_core.errors import ModelError
from mens_core.exchange import NF4Spec, QuantizedWeight

__all__ = ["NF4Weight", "dequantize", "export_weight", "import_weight", "quantize"]

# Fixed by bitsandbytes: scales that are quantised themselves share a scale in groups of this many.
_NESTED_BLOCK = 256


@attrs.frozen(kw_only=True, eq=False)
class NF4Weight:
    """A weight in NF4 on its device; the fields of ``QuantizedWeight`` as tensors.

    Attributes:
        codes: (ceil(numel / 2),) uint8, the earlier code of a byte in the high nibble.
        absmax: (blocks,) float32, or uint8 with double quantization.
        nested_absmax: (ceil(blocks / 256),) float32, or None without double quantization.
        offset: () float32, or None without double quantization.
        shape: (out, in).
        spec: how it was stored.
    """

    codes: Array
    absmax: Array
    nested_absmax: Array | None
    offset: Array | None
    shape: tuple[int, ...]
    spec: NF4Spec


def quantize(weight: Array, spec: NF4Spec) -> NF4Weight:
    """Store a weight in NF4, byte for byte as ``bitsandbytes.functional.quantize_4bit``.

    Args:
        weight: (out, in), any float format; quantised from its float32 value.
        spec: block size and whether the scales are quantised too.

    Raises:
        ModelError: if a value is not finite.
    """
    values = weight.detach().to(torch.float32).contiguous()
    if not bool(torch.isfinite(values).all()):
        raise ModelError(
            "a weight that is not finite cannot be stored in NF4",
            where=f"weight of shape {tuple(weight.shape)}",
            expected="finite numbers only",
        )
    codes, state = _bitsandbytes().quantize_4bit(
        values, blocksize=spec.block_size, compress_statistics=spec.double_quant, quant_type="nf4"
    )
    return NF4Weight(
        codes=codes.reshape(-1),
        absmax=state.absmax,
        nested_absmax=state.state2.absmax if state.nested else None,
        offset=state.offset if state.nested else None,
        shape=tuple(weight.shape),
        spec=spec,
    )


def dequantize(weight: NF4Weight, dtype: torch.dtype) -> Array:
    """Codebook value times the block's absmax, in float32, then rounded to ``dtype``.

    Returns:
        (out, in), contiguous, newly allocated.
    """
    library = _bitsandbytes()
    absmax = weight.absmax
    if weight.nested_absmax is not None and weight.offset is not None:
        nested = library.QuantState(
            absmax=weight.nested_absmax,
            code=_dynamic_map(str(absmax.device)),
            blocksize=_NESTED_BLOCK,
            dtype=torch.float32,
        )
        absmax = library.dequantize_blockwise(absmax, nested) + weight.offset
    # bitsandbytes' AVX-512 kernel is inexact from this block size on; its own replacement is compiled on first use.
    if weight.codes.device.type == "cpu" and weight.spec.block_size >= 2048:
        flat = _looked_up(weight, absmax).to(dtype)
    else:
        # Odd widths have no kernel on the CPU, but as one long row of whole bytes every weight is even.
        whole = library.QuantState(
            absmax=absmax,
            shape=torch.Size((1, 2 * weight.codes.numel())),
            blocksize=weight.spec.block_size,
            quant_type="nf4",
            dtype=dtype,
        )
        flat = library.dequantize_4bit(weight.codes[:, None], whole).reshape(-1)
    return flat[: math.prod(weight.shape)].view(weight.shape)


def export_weight(weight: NF4Weight) -> QuantizedWeight:
    """Copy an NF4 weight into the record that crosses the hooks."""
    nested = weight.nested_absmax
    return QuantizedWeight(
        codes=weight.codes.cpu().numpy().copy(),
        absmax=weight.absmax.cpu().numpy().copy(),
        nested_absmax=None if nested is None else nested.cpu().numpy().copy(),
        offset=0.0 if weight.offset is None else float(weight.offset),
        shape=weight.shape,
        spec=weight.spec,
    )


def import_weight(record: QuantizedWeight, device: str) -> NF4Weight:
    """Put a record that crossed the hooks onto a device; the inverse of ``export_weight``."""
    nested = record.nested_absmax
    return NF4Weight(
        codes=torch.tensor(record.codes, device=device),
        absmax=torch.tensor(record.absmax, device=device),
        nested_absmax=None if nested is None else torch.tensor(nested, device=device),
        offset=None if nested is None else torch.tensor(record.offset, dtype=torch.float32, device=device),
        shape=tuple(record.shape),
        spec=record.spec,
    )


@cache
def _bitsandbytes() -> Any:
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
def _dynamic_map(device: str) -> Array:
    values: Array = _bitsandbytes().create_dynamic_map()
    return values.to(device)


def _looked_up(weight: NF4Weight, absmax: Array) -> Array:
    """(2 · bytes,) float32: both values of each byte out of a table of 256 pairs, times their block's absmax."""
    values = _bitsandbytes().get_4bit_type("nf4", device="cpu")
    pairs = torch.stack([values.repeat_interleave(16), values.repeat(16)], dim=1)
    found = torch.nn.functional.embedding(weight.codes.int(), pairs).reshape(-1)
    whole = found.numel() // weight.spec.block_size * weight.spec.block_size
    found[:whole].view(-1, weight.spec.block_size).mul_(absmax[: whole // weight.spec.block_size, None])
    found[whole:].mul_(absmax[-1])
    return found
