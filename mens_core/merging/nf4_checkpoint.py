"""Linear layers as bitsandbytes' 4-bit checkpoints hold them, which transformers opens without being told anything.

::

    <name>.weight                                     uint8 (ceil(n / 2), 1)   codes, two a byte
    <name>.weight.absmax                              uint8 or float32 (blocks,)
    <name>.weight.quant_map                           float32 (16,)            values of the codes
    <name>.weight.nested_absmax, .nested_quant_map    float32                  with double quantization
    <name>.weight.quant_state.bitsandbytes__nf4       uint8                    JSON: shape, block sizes, offset

Source: github.com/bitsandbytes-foundation/bitsandbytes, ``QuantState.as_dict`` and ``from_dict`` in ``functional.py``;
github.com/huggingface/transformers, ``quantizers/quantizer_bnb_4bit.py``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from mens_core.artifacts.tensors import StoredBytes
from mens_core.backend import Backend
from mens_core.exchange import NF4Spec, QuantizedWeight
from mens_core.merging.numbers import TensorError
from mens_core.nf4 import CODEBOOKS
from mens_core.nf4_scales import NESTED_BLOCK, dynamic_map

__all__ = ["Part", "as_rows", "filled", "quantization_config", "quantize_merged", "row_notes", "write_parts"]

_DTYPE_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_CODES = {np.dtype(np.uint8): "U8", np.dtype(np.float32): "F32"}
# What transformers' own default leaves out; said, because other readers have no default.
_NOT_QUANTISED = ["lm_head"]


@attrs.frozen(kw_only=True)
class Part:
    """One tensor of a layer in NF4.

    Attributes:
        code: of its format, as in safetensors.
        shape: lengths of its axes.
        stored: where it lies until it is written.
    """

    code: str
    shape: tuple[int, ...]
    stored: StoredBytes


def as_rows(weight: NDArray[Any], transposed: bool) -> NDArray[np.float32]:
    """A stored weight as (out, in) in float32, the order in which it is cut into blocks; copied only if it has to be.

    Args:
        weight: (out, in), or (in, out) if transposed, as GPT-2 stores it.
        transposed: which of them it is.
    """
    return np.ascontiguousarray(weight.T if transposed else weight, np.float32)


def filled(shape: tuple[int, ...], blocks: Iterable[Callable[[], NDArray[np.float32]]]) -> NDArray[np.float32]:
    """Blocks of rows as one array, of which no second copy is made."""
    whole, row = np.empty(shape, np.float32), 0
    for make in blocks:
        block = make()
        whole[row : row + len(block)] = block
        row += len(block)
    return whole


def quantize_merged(
    before: QuantizedWeight, merged: NDArray[np.float32], backend: Backend, error: TensorError
) -> QuantizedWeight:
    """Store a merged weight as its base would be, and state what storing it took away.

    Args:
        before: the weight that was merged onto, stored.
        merged: (out, in).
        backend: whose ``mens_quantize`` and ``mens_dequantize`` compute.
        error: gets the rounding, and for the elements that changed those with another code than the base's: where no
            code changes, the update is lost whatever the scales do.
    """
    quantized = backend.quantize(merged, before.spec)
    rows = zip(backend.dequantize(quantized), merged, strict=True)
    error.rounding = math.sqrt(sum(float(np.square(back - row).sum()) for back, row in rows))
    different = quantized.codes ^ before.codes
    error.changed = int(np.count_nonzero(different & 0xF0)) + int(np.count_nonzero(different & 0x0F))
    return quantized


def write_parts(scratch: Path, name: str, quantized: QuantizedWeight, code: str) -> dict[str, Part]:
    """Append a layer to a file of raw bytes, so that no more than one layer is ever held.

    Args:
        scratch: the file; made if it is not there.
        name: of the weight, as the base stores it.
        quantized: the layer.
        code: of the format that the weight has when it is brought back.

    Returns:
        Name in the checkpoint → the tensor.

    Raises:
        OSError: as the file system reports it.
    """
    parts: dict[str, Part] = {}
    with scratch.open("ab") as file:
        for part, tensor in _tensors(name, quantized, code).items():
            start = file.tell()
            file.write(tensor.tobytes())
            stored = StoredBytes(scratch, start, file.tell())
            parts[part] = Part(code=_CODES[tensor.dtype], shape=tensor.shape, stored=stored)
    return parts


def quantization_config(spec: NF4Spec, code: str) -> dict[str, Any]:
    """The entry of config.json by which transformers knows such a checkpoint.

    Args:
        spec: how the layers are stored.
        code: of the format in which they multiply.
    """
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": spec.codebook,
        "bnb_4bit_use_double_quant": spec.double_quant,
        "bnb_4bit_compute_dtype": _DTYPE_NAMES[code],
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": _NOT_QUANTISED,
    }


def row_notes(shapes: Iterable[tuple[int, int]], spec: NF4Spec) -> list[str]:
    """What is to be said where rows are no whole blocks: bitsandbytes 0.50 then reads scales from wrong places on CPUs.

    Args:
        shapes: (out, in) of the layers.
        spec: how they are stored.
    """
    odd = sorted({into for _, into in shapes if into % spec.block_size})
    if not odd:
        return []
    rows = f"rows of {', '.join(map(str, odd))} numbers are no whole blocks of {spec.block_size}"
    return [f"{rows}: the checkpoint is right, but bitsandbytes brings such layers back wrongly on a CPU"]


def _tensors(name: str, quantized: QuantizedWeight, code: str) -> dict[str, NDArray[Any]]:
    spec = quantized.spec
    state: dict[str, Any] = {
        "quant_type": spec.codebook,
        "blocksize": spec.block_size,
        "dtype": _DTYPE_NAMES[code],
        "shape": list(quantized.shape),
    }
    tensors: dict[str, NDArray[Any]] = {
        name: quantized.codes.reshape(-1, 1),
        f"{name}.absmax": quantized.absmax,
        f"{name}.quant_map": CODEBOOKS[spec.codebook],
    }
    if quantized.nested_absmax is not None:
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": quantized.offset}
        tensors[f"{name}.nested_absmax"] = quantized.nested_absmax
        tensors[f"{name}.nested_quant_map"] = dynamic_map()
    text = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return tensors | {f"{name}.quant_state.bitsandbytes__{spec.codebook}": text}
