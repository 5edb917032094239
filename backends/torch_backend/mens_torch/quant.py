"""NF4 storage of a frozen weight, by bitsandbytes (Dettmers et al. 2023, QLoRA, section 3).

::

    weight (out, in) ──▶ blocks of 64 ──▶ absmax of each block (float32, or uint8 by double quantization)
                                     └──▶ codes: nearest of 16 codebook values to weight / absmax, two a byte
    weight ≈ codebook[codes] · absmax
"""

from __future__ import annotations

import math

import attrs
import ml_dtypes
import torch
from torch import Tensor as Array

from mens_core import nf4
from mens_core.exchange import NF4Spec, QuantizedWeight
from mens_core.nf4_scales import NESTED_BLOCK
from mens_torch._bitsandbytes import dynamic_map, library
from mens_torch._formats import rounded
from mens_torch._nf4_loop import TOGETHER, row_product, write_dense

__all__ = ["NF4Weight", "dequantize", "export_weight", "import_weight", "quantize"]


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

    def write(self, out: Array) -> Array:
        """Bring a weight on the CPU back into memory that is there, as ``dequantize`` does into new memory.

        Args:
            out: (numel,), contiguous, of any float format; overwritten.

        Returns:
            ``out`` as (out, in).
        """
        write_dense(*self._stored(), out)
        return out.view(self.shape)

    def is_one_row(self, x: Array) -> bool:
        """Whether ``row_product`` takes x, (..., in): one row in float32 or bfloat16 on the CPU, of whole blocks."""
        width, size = self.shape[-1], self.spec.block_size
        alone = x.numel() == width and x.dtype in {torch.float32, torch.bfloat16} and x.is_cpu
        return alone and width % size == 0 and size % TOGETHER == 0

    def row_product(self, x: Array) -> Array:
        """X Wᵀ of one row: (..., in) to (..., out), summed over what ``write`` gives in float32, then rounded."""
        return rounded(row_product(rounded(x, torch.float32), *self._stored()), x.dtype)

    def _stored(self) -> tuple[Array, Array, Array | None, Array | None, NF4Spec]:
        return self.codes, self.absmax, self.nested_absmax, self.offset, self.spec


def quantize(weight: Array, spec: NF4Spec) -> NF4Weight:
    """Store a weight in NF4, byte for byte as ``bitsandbytes.functional.quantize_4bit``.

    On a CPU ``mens_core.nf4`` stores it, and the weight is not copied if it is contiguous; elsewhere bitsandbytes does.

    Args:
        weight: (out, in), any float format; quantised from its float32 value.
        spec: codebook, block size, and whether the scales are quantised too.

    Raises:
        ModelError: if a value is not finite.
    """
    values = weight.detach().contiguous()
    if values.device.type != "cpu":
        return _quantize_on_device(values, spec)
    if values.dtype == torch.bfloat16:
        array = values.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    else:
        array = values.numpy()
    return import_weight(nf4.quantize(array, spec, torch.get_num_threads()), "cpu")


def dequantize(weight: NF4Weight, dtype: torch.dtype) -> Array:
    """Codebook value times the block's absmax, in float32, then rounded to ``dtype``.

    Returns:
        (out, in), contiguous, newly allocated.
    """
    if weight.codes.device.type != "cpu":
        return _dequantize_on_device(weight, dtype)
    return weight.write(torch.empty(math.prod(weight.shape), dtype=dtype))


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


def _scales(weight: NF4Weight) -> Array:
    """(blocks,) float32: the absmax of each block, itself brought back if it is quantised."""
    if weight.nested_absmax is None or weight.offset is None:
        return weight.absmax
    nested = library().QuantState(
        absmax=weight.nested_absmax,
        code=dynamic_map(str(weight.absmax.device)),
        blocksize=NESTED_BLOCK,
        dtype=torch.float32,
    )
    scales: Array = library().dequantize_blockwise(weight.absmax, nested)
    return scales.add_(weight.offset)


def _quantize_on_device(values: Array, spec: NF4Spec) -> NF4Weight:
    values = values.to(torch.float32)
    if not bool(torch.isfinite(values).all()):
        raise nf4.not_finite(tuple(values.shape))
    codes, state = library().quantize_4bit(
        values, blocksize=spec.block_size, compress_statistics=spec.double_quant, quant_type=spec.codebook
    )
    return NF4Weight(
        codes=codes.reshape(-1),
        absmax=state.absmax,
        nested_absmax=state.state2.absmax if state.nested else None,
        offset=state.offset if state.nested else None,
        shape=tuple(values.shape),
        spec=spec,
    )


def _dequantize_on_device(weight: NF4Weight, dtype: torch.dtype) -> Array:
    # As one long row of whole bytes every weight has an even width.
    whole = library().QuantState(
        absmax=_scales(weight),
        shape=torch.Size((1, 2 * weight.codes.numel())),
        blocksize=weight.spec.block_size,
        quant_type=weight.spec.codebook,
        dtype=dtype,
    )
    flat: Array = library().dequantize_4bit(weight.codes[:, None], whole).reshape(-1)
    return flat[: math.prod(weight.shape)].view(weight.shape)
