"""Bringing a weight in NF4 back on a CPU, into memory that is there, in one pass over its codes.

::

    block's absmax, itself brought back ──▶ 16 values · absmax, rounded ──▶ 64 codes choose among them, 64 results

The sixteen products of a block stay in a vector register and a permutation of it is the look-up, so a result costs
neither a load nor a product of its own. LLVM has no such instruction that holds on every processor; it knows
sixteen choices by index for what they are and turns them into one permutation where there is one (AVX-512), else
into loads.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor as Array

from mens_core.compiled import compiled, in_shares
from mens_core.exchange import NF4Spec
from mens_core.nf4 import CODEBOOKS
from mens_core.nf4_scales import NESTED_BLOCK, dynamic_map

__all__ = ["write_dense"]

# Codes looked up together: a block of the usual size.
_TOGETHER = 64


def write_dense(
    codes: Array, absmax: Array, nested_absmax: Array | None, offset: Array | None, spec: NF4Spec, out: Array
) -> None:
    """Codebook value times the block's absmax, in float32, then rounded to the format of ``out``.

    Args:
        codes: (ceil(numel / 2),) uint8, on the CPU; the earlier code of a byte in the high nibble.
        absmax: (blocks,) float32, or uint8 with double quantization.
        nested_absmax: (ceil(blocks / 256),) float32, or None without double quantization.
        offset: () float32, or None without double quantization.
        spec: how the weight was stored.
        out: (numel,), contiguous, any float format; overwritten.
    """
    scales = (
        absmax.numpy(),
        None if nested_absmax is None else nested_absmax.numpy(),
        None if offset is None else np.float32(offset),
    )
    book, size = CODEBOOKS[spec.codebook], spec.block_size
    compiles = out.dtype in {torch.float32, torch.bfloat16} and size % _TOGETHER == 0
    whole = out.numel() // size if compiles else 0
    if whole:
        # numba has no bfloat16; its bits pass as integers.
        room = out.numpy() if out.dtype == torch.float32 else out.view(torch.uint16).numpy()
        write = functools.partial(_loop(), codes.numpy(), *scales, dynamic_map(), book, size, room)
        in_shares(write, whole, size, torch.get_num_threads())
    if whole < len(absmax):
        _write_rest(codes.numpy(), _scales_from(whole, *scales), book, size, out, whole)


def _scales_from(
    first: int, absmax: NDArray[Any], nested_absmax: NDArray[np.float32] | None, offset: np.float32 | None
) -> NDArray[np.float32]:
    if nested_absmax is None or offset is None:
        return absmax[first:]
    groups = np.arange(first, len(absmax)) // NESTED_BLOCK
    scales: NDArray[np.float32] = dynamic_map()[absmax[first:]] * nested_absmax[groups] + offset
    return scales


def _write_rest(
    codes: NDArray[np.uint8],
    scales: NDArray[np.float32],
    book: NDArray[np.float32],
    block_size: int,
    out: Array,
    first: int,
) -> None:
    """The blocks from ``first`` on, which are not what the loop takes: the definition, array by array."""
    bytes_, rest = codes[first * block_size // 2 :], out[first * block_size :]
    values = book[np.stack([bytes_ >> 4, bytes_ & 15], axis=1).reshape(-1)[: rest.numel()]]
    # Infinite scales give what they give.
    with np.errstate(over="ignore", invalid="ignore"):
        rest.copy_(torch.from_numpy(values * np.repeat(scales, block_size)[: rest.numel()]))


@functools.cache
def _loop() -> Any:
    # Imported on use, as in ``compiled``.
    from numba.extending import intrinsic, overload  # noqa: PLC0415

    permuted = intrinsic(_typed_look_up)

    def call(codes: Any, at: Any, book: Any, scale: Any, out: Any, to: Any) -> None:
        permuted(codes, at, book, scale, out, to)

    # It asks by the names of the arguments; LLVM finds the code of a block too long to put it in line by itself.
    @overload(_look_up, jit_options={"forceinline": True})  # type: ignore[untyped-decorator]
    def _(codes: Any, at: Any, book: Any, scale: Any, out: Any, to: Any) -> Any:  # noqa: ARG001
        return call

    return compiled(_write_blocks)


def _write_blocks(
    codes: NDArray[np.uint8],
    absmax: NDArray[Any],
    nested_absmax: NDArray[np.float32] | None,
    offset: np.float32 | None,
    scales: NDArray[np.float32],
    book: NDArray[np.float32],
    block_size: int,
    out: NDArray[Any],
    first: int,
    last: int,
) -> None:
    """Fill blocks ``first`` to ``last`` of ``out``."""
    for block in range(first, last):
        if nested_absmax is None:
            scale = absmax[block]
        else:
            scale = scales[absmax[block]] * nested_absmax[block // NESTED_BLOCK] + offset
        for i in range(block * block_size, block * block_size + block_size, _TOGETHER):
            _look_up(codes, i // 2, book, scale, out, i)


def _look_up(
    codes: NDArray[np.uint8],
    at: int,
    book: NDArray[np.float32],
    scale: np.float32,
    out: NDArray[Any],
    to: int,
) -> None:
    """Bring 64 codes back, those from byte ``at`` on, to ``out[to:]``: what is said here is what is compiled."""
    bytes_ = codes[at : at + _TOGETHER // 2]
    products = torch.from_numpy(book * scale)
    rounded = products if out.dtype == np.float32 else products.bfloat16().view(torch.uint16)
    out[to : to + _TOGETHER] = rounded.numpy()[np.stack([bytes_ >> 4, bytes_ & 15], axis=1).reshape(-1)]


def _typed_look_up(_: Any, codes: Any, at: Any, book: Any, scale: Any, out: Any, to: Any) -> Any:
    """``_look_up`` as numba asks for it: the types of a call, and what writes its code."""
    from numba import types  # noqa: PLC0415

    return types.void(codes, at, book, scale, out, to), _write_look_up


def _write_look_up(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    """The code of ``_look_up``, all in vectors."""
    from llvmlite import ir  # noqa: PLC0415

    def place(argument: int, index: Any, element: Any, count: int) -> Any:
        array = context.make_array(signature.args[argument])(context, builder, arguments[argument])
        return builder.bitcast(builder.gep(array.data, [index]), ir.VectorType(element, count).as_pointer())

    _, at, _, scale, _, to = arguments
    narrow = signature.args[4].dtype.bitwidth == 16
    # As many as a vector register of 512 bits holds.
    count, element = (32, ir.IntType(16)) if narrow else (16, ir.FloatType())
    book = builder.load(place(2, at.type(0), ir.FloatType(), 16), align=4)
    one = builder.insert_element(ir.Constant(book.type, ir.Undefined), scale, ir.Constant(ir.IntType(32), 0))
    table = builder.fmul(book, builder.shuffle_vector(one, one, _filled(32, [0] * 16)))
    if narrow:
        table = _to_bfloat16(builder, table)
        table = builder.shuffle_vector(table, table, _filled(32, [lane % 16 for lane in range(count)]))
    for piece in range(0, _TOGETHER, count):
        here, there = (
            builder.add(start, ir.Constant(at.type, past)) for start, past in ((at, piece // 2), (to, piece))
        )
        pairs = builder.load(place(0, here, ir.IntType(8), count // 2), align=1)
        found = _chosen(builder, table, _nibbles(builder, pairs, count), count)
        builder.store(found, place(4, there, element, count), align=element.get_abi_size(context.target_data))
    return context.get_dummy_value()


def _filled(width: int, values: list[int]) -> Any:
    from llvmlite import ir  # noqa: PLC0415

    return ir.Constant(ir.VectorType(ir.IntType(width), len(values)), values)


def _to_bfloat16(builder: Any, table: Any) -> Any:
    """To nearest, ties to even, in integers: the processor's own instruction takes subnormal numbers for zero."""
    from llvmlite import ir  # noqa: PLC0415

    bits = builder.bitcast(table, ir.VectorType(ir.IntType(32), 16))
    sixteen = _filled(32, [16] * 16)
    odd = builder.and_(builder.lshr(bits, sixteen), _filled(32, [1] * 16))
    rounded = builder.lshr(builder.add(bits, builder.add(odd, _filled(32, [0x7FFF] * 16))), sixteen)
    # A NaN could be rounded into a number.
    kept = builder.select(builder.fcmp_unordered("uno", table, table), _filled(32, [0x7FC0] * 16), rounded)
    return builder.trunc(kept, ir.VectorType(ir.IntType(16), 16))


def _nibbles(builder: Any, pairs: Any, count: int) -> Any:
    half = count // 2
    high, low = builder.lshr(pairs, _filled(8, [4] * half)), builder.and_(pairs, _filled(8, [15] * half))
    return builder.shuffle_vector(high, low, _filled(32, [lane // 2 + lane % 2 * half for lane in range(count)]))


def _chosen(builder: Any, table: Any, codes: Any, count: int) -> Any:
    """table[codes], lane by lane: LLVM sees one permutation in it if the codes are as wide as the values."""
    from llvmlite import ir  # noqa: PLC0415

    codes = builder.zext(codes, ir.VectorType(ir.IntType(512 // count), count))
    found = ir.Constant(table.type, ir.Undefined)
    for lane in (ir.Constant(ir.IntType(32), lane) for lane in range(count)):
        found = builder.insert_element(
            found, builder.extract_element(table, builder.extract_element(codes, lane)), lane
        )
    return found
