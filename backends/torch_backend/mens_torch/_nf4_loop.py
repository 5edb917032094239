"""Bringing a weight in NF4 back on a CPU, in one pass over its codes: all of it, or a row at a time for one product.

::

    block's absmax, itself brought back ──▶ 16 values · absmax, rounded ──▶ 64 codes choose among them, 64 results

The sixteen products of a block stay in vector registers, so a result costs neither a load nor a product of its own.
With AVX-512 one instruction looks 16 or 32 codes up in them, with AVX2 8 in either half of float32 ones. Elsewhere
their first bytes lie in one register, their second bytes in another, and one instruction looks 32 codes up in sixteen
bytes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor as Array

from mens_core.compiled import compiled, in_shares
from mens_core.exchange import NF4Spec
from mens_core.nf4 import CODEBOOKS
from mens_core.nf4_scales import NESTED_BLOCK, dynamic_map

__all__ = ["TOGETHER", "row_product", "write_dense"]

# Codes looked up together: a block of the usual size.
TOGETHER = 64


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
    scales = _as_arrays(absmax, nested_absmax, offset)
    book, size = CODEBOOKS[spec.codebook], spec.block_size
    compiles = out.dtype in {torch.float32, torch.bfloat16} and size % TOGETHER == 0
    whole = out.numel() // size if compiles else 0
    if whole:
        # numba has no bfloat16; its bits pass as integers.
        room = out.numpy() if out.dtype == torch.float32 else out.view(torch.uint16).numpy()
        write = functools.partial(_loop(_write_blocks), codes.numpy(), *scales, dynamic_map(), book, size, room, 0)
        in_shares(write, whole, size, torch.get_num_threads())
    if whole < len(absmax):
        _write_rest(codes.numpy(), _scales_from(whole, *scales), book, size, out, whole)


def row_product(
    x: Array, codes: Array, absmax: Array, nested_absmax: Array | None, offset: Array | None, spec: NF4Spec
) -> Array:
    """One row times what ``write_dense`` gives, of which a row at a time is there: (..., in) to (..., out).

    Args:
        x: (..., in) float32, on the CPU; in is whole blocks, and a block whole look-ups (``TOGETHER``).
        codes: with the others as ``write_dense`` takes them.
        absmax: of each block.
        nested_absmax: of each group of blocks, or None.
        offset: of the scales, or None.
        spec: how the weight was stored.
    """
    row, blocks = x.detach().reshape(-1), x.shape[-1] // spec.block_size
    out = x.new_empty(*x.shape[:-1], len(absmax) // blocks)
    stored = codes.numpy(), *_as_arrays(absmax, nested_absmax, offset), dynamic_map(), CODEBOOKS[spec.codebook]
    loop = _loop(_write_sums, in_any_order=True)
    sums = functools.partial(loop, *stored, spec.block_size, row.numpy(), out.view(-1).numpy())
    in_shares(sums, out.numel(), len(row), torch.get_num_threads())
    return out


def _as_arrays(
    absmax: Array, nested_absmax: Array | None, offset: Array | None
) -> tuple[NDArray[Any], NDArray[np.float32] | None, np.float32 | None]:
    nested = None if nested_absmax is None else nested_absmax.numpy()
    return absmax.numpy(), nested, None if offset is None else np.float32(offset)


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


def _loop(function: Callable[..., None], *, in_any_order: bool = False) -> Any:
    _make_known()
    return compiled(function, in_any_order=in_any_order)


@functools.cache
def _make_known() -> None:
    """Tell numba what the loops call."""
    # Imported on use, as in ``compiled``.
    from numba.extending import intrinsic, overload, register_jitable  # noqa: PLC0415

    permuted = intrinsic(_typed_look_up)

    def call(codes: Any, at: Any, book: Any, scale: Any, out: Any, to: Any) -> None:
        permuted(codes, at, book, scale, out, to)

    # It asks by the names of the arguments; LLVM finds the code of a block too long to put it in line by itself.
    @overload(_look_up, jit_options={"forceinline": True})  # type: ignore[untyped-decorator]
    def _(codes: Any, at: Any, book: Any, scale: Any, out: Any, to: Any) -> Any:  # noqa: ARG001
        return call

    # Said here, since what is compiled for a caller takes its options over: scales have the same bits everywhere.
    register_jitable(error_model="numpy", fastmath=False)(_write_blocks)


def _write_blocks(
    codes: NDArray[np.uint8],
    absmax: NDArray[Any],
    nested_absmax: NDArray[np.float32] | None,
    offset: np.float32 | None,
    scales: NDArray[np.float32],
    book: NDArray[np.float32],
    block_size: int,
    out: NDArray[Any],
    origin: int,
    first: int,
    last: int,
) -> None:
    """Fill ``out``, which begins with number ``origin`` of the weight, with blocks ``first`` to ``last``."""
    for block in range(first, last):
        if nested_absmax is None:
            scale = absmax[block]
        else:
            scale = scales[absmax[block]] * nested_absmax[block // NESTED_BLOCK] + offset
        for i in range(block * block_size, block * block_size + block_size, TOGETHER):
            _look_up(codes, i // 2, book, scale, out, i - origin)


def _write_sums(
    codes: NDArray[np.uint8],
    absmax: NDArray[Any],
    nested_absmax: NDArray[np.float32] | None,
    offset: np.float32 | None,
    scales: NDArray[np.float32],
    book: NDArray[np.float32],
    block_size: int,
    row: NDArray[np.float32],
    out: NDArray[np.float32],
    first: int,
    last: int,
) -> None:
    """Fill ``out[first:last]`` with the products of the weight's rows and ``row``."""
    width = len(row)
    blocks, room = width // block_size, np.empty(width, np.float32)
    for at in range(first, last):
        begin, end = at * blocks, (at + 1) * blocks
        _write_blocks(codes, absmax, nested_absmax, offset, scales, book, block_size, room, at * width, begin, end)
        total = np.float32(0)
        for i in range(width):
            total += room[i] * row[i]
        out[at] = total


def _look_up(
    codes: NDArray[np.uint8],
    at: int,
    book: NDArray[np.float32],
    scale: np.float32,
    out: NDArray[Any],
    to: int,
) -> None:
    """Bring 64 codes back, those from byte ``at`` on, to ``out[to:]``: what is said here is what is compiled."""
    bytes_ = codes[at : at + TOGETHER // 2]
    products = torch.from_numpy(book * scale)
    rounded = products if out.dtype == np.float32 else products.bfloat16().view(torch.uint16)
    out[to : to + TOGETHER] = rounded.numpy()[np.stack([bytes_ >> 4, bytes_ & 15], axis=1).reshape(-1)]


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
    width = signature.args[4].dtype.bitwidth
    book = builder.load(place(2, at.type(0), ir.FloatType(), 16), align=4)
    # Of all NaNs the one that rounding leaves a NaN.
    scale = builder.select(builder.fcmp_unordered("uno", scale, scale), ir.Constant(scale.type, math.nan), scale)
    one = builder.insert_element(ir.Constant(book.type, ir.Undefined), scale, ir.Constant(ir.IntType(32), 0))
    products = builder.fmul(book, builder.shuffle_vector(one, one, _filled(32, [0] * 16)))
    bits = builder.bitcast(products, ir.VectorType(ir.IntType(32), 16))
    table = bits if width == 32 else _rounded_to_bfloat16(builder, bits)

    def codes(first: int, count: int) -> Any:
        there = builder.add(at, ir.Constant(at.type, first))
        return builder.load(place(0, there, ir.IntType(8), count), align=1)

    narrow = _by_halves if width == 32 and _has("avx2") else _by_bytes
    look_up = _by_numbers if _has("avx512bw") else narrow
    for found in look_up(builder, table, width, codes):
        builder.store(found, place(4, to, ir.IntType(width), found.type.count), align=width // 8)
        to = builder.add(to, ir.Constant(to.type, found.type.count))
    return context.get_dummy_value()


def _by_numbers(builder: Any, table: Any, width: int, codes: Callable[[int, int], Any]) -> Iterator[Any]:
    """One instruction looks 16 codes up in the numbers, or 32 in their halves, of which the upper ones are meant.

    Args:
        builder: writes the instructions.
        table: 16 products of 32 bits.
        width: of the numbers that are looked up: the upper bits of the products, 16 or 32.
        codes: so many bytes from so many on, two codes each.

    Yields:
        The 64 numbers, some at a time.
    """
    from llvmlite import ir  # noqa: PLC0415

    count, half = 512 // width, 32 // width - 1
    wide = ir.VectorType(ir.IntType(2 * width), count // 2)
    parts = builder.bitcast(table, ir.VectorType(ir.IntType(width), count))
    # Among halves the upper one of product c has place 2 c + 1. No more bits of a place are looked at than it needs.
    up, down, upper = (_filled(2 * width, [n] * wide.count) for n in (width + half, 4 - half, half | half << width))
    for first in range(0, TOGETHER // 2, wide.count):
        # The code in a byte's high bits comes first.
        pairs = builder.zext(codes(first, wide.count), wide)
        places = builder.or_(builder.or_(builder.shl(pairs, up), builder.lshr(pairs, down)), upper)
        name = f"llvm.x86.avx512.permvar.{ {16: 'hi', 32: 'si'}[width] }.512"
        yield _instruction(builder, name, parts, builder.bitcast(places, parts.type))


def _by_halves(builder: Any, table: Any, width: int, codes: Callable[[int, int], Any]) -> Iterator[Any]:
    """One instruction looks 8 codes up in 8 numbers, in either half of the table; a code's highest bit says in which.

    Arguments and results as above; the width is 32.
    """
    from llvmlite import ir  # noqa: PLC0415

    eight = ir.VectorType(ir.IntType(width), 8)
    halves = [
        builder.bitcast(builder.shuffle_vector(table, table, _filled(32, [*range(at, at + 8)])), eight) for at in (0, 8)
    ]
    # Of four bytes each lane gets its own code as its lowest bits; of a place no more bits are looked at than it needs.
    turns, top = _filled(width, [4, 0, 12, 8, 20, 16, 28, 24]), _filled(width, [8] * 8)
    for first in range(0, TOGETHER // 2, 4):
        four = builder.bitcast(codes(first, 4), ir.IntType(32))
        one = builder.insert_element(ir.Constant(eight, ir.Undefined), four, ir.Constant(ir.IntType(32), 0))
        places = builder.lshr(builder.shuffle_vector(one, one, _filled(32, [0] * 8)), turns)
        low, high = (_instruction(builder, "llvm.x86.avx2.permd", half, places) for half in halves)
        upper = builder.icmp_unsigned("!=", builder.and_(places, top), _filled(width, [0] * 8))
        yield builder.select(upper, high, low)


def _by_bytes(builder: Any, table: Any, width: int, codes: Callable[[int, int], Any]) -> Iterator[Any]:
    """The bytes of 64 numbers are looked up, 32 at a time, and interleaved; arguments and results as above."""
    from llvmlite import ir  # noqa: PLC0415

    bytes_, pairs = _bytes_of(builder, table, width), codes(0, TOGETHER // 2)
    high, low = builder.lshr(pairs, _filled(8, [4] * 32)), builder.and_(pairs, _filled(8, [15] * 32))
    results = [
        part
        for half in _in_turns(builder, high, low, 8)
        for part in _joined(builder, [_chosen(builder, byte, half) for byte in bytes_])
    ]
    # The lower lanes of all parts hold the first 32 results, the upper ones the others.
    for lane in (0, 16):
        for one, two in zip(results[::2], results[1::2], strict=True):
            lanes = _filled(32, [*range(lane, lane + 16), *range(32 + lane, 48 + lane)])
            yield builder.bitcast(
                builder.shuffle_vector(one, two, lanes), ir.VectorType(ir.IntType(width), 256 // width)
            )


def _filled(width: int, values: list[int]) -> Any:
    from llvmlite import ir  # noqa: PLC0415

    return ir.Constant(ir.VectorType(ir.IntType(width), len(values)), values)


def _rounded_to_bfloat16(builder: Any, bits: Any) -> Any:
    """To nearest, ties to even, in the upper halves; what is left in the lower ones means nothing.

    In integers: the processor's own instruction takes subnormal numbers for zero.
    """
    odd = builder.and_(builder.lshr(bits, _filled(32, [16] * 16)), _filled(32, [1] * 16))
    return builder.add(builder.add(bits, _filled(32, [0x7FFF] * 16)), odd)


def _bytes_of(builder: Any, table: Any, width: int) -> list[Any]:
    """A table of 16 numbers, the upper bits of as many of 32, as one of 16 bytes for each byte, the lowest first."""
    from llvmlite import ir  # noqa: PLC0415

    shifted = (builder.lshr(table, _filled(32, [shift] * 16)) for shift in range(32 - width, 32, 8))
    return [builder.trunc(part, ir.VectorType(ir.IntType(8), 16)) for part in shifted]


def _chosen(builder: Any, table: Any, codes: Any) -> Any:
    """``table[codes]``, 32 bytes from 16: one instruction where the processor has it, else byte by byte."""
    from llvmlite import ir  # noqa: PLC0415

    if _has("avx2"):
        twice = builder.shuffle_vector(table, table, _filled(32, [*range(16)] * 2))
        return _instruction(builder, "llvm.x86.avx2.pshuf.b", twice, codes)
    if _architecture() in {"aarch64", "arm64"}:
        halves = [builder.shuffle_vector(codes, codes, _filled(32, [*range(at, at + 16)])) for at in (0, 16)]
        found = [_instruction(builder, "llvm.aarch64.neon.tbl1.v16i8", table, half) for half in halves]
        return builder.shuffle_vector(*found, _filled(32, [*range(32)]))
    chosen = ir.Constant(codes.type, ir.Undefined)
    for lane in (ir.Constant(ir.IntType(32), lane) for lane in range(32)):
        byte = builder.extract_element(table, builder.extract_element(codes, lane))
        chosen = builder.insert_element(chosen, byte, lane)
    return chosen


def _has(feature: str) -> bool:
    """Whether this is an x86 with it, and numba was not told to do without: LLVM ends the process at one it lacks."""
    from llvmlite import binding  # noqa: PLC0415
    from numba.core import config  # noqa: PLC0415

    told = config.CPU_NAME is not None or config.CPU_FEATURES is not None or not config.ENABLE_AVX
    return _architecture() == "x86_64" and not told and bool(binding.get_host_cpu_features().get(feature))


def _architecture() -> str:
    from llvmlite import binding  # noqa: PLC0415

    return str(binding.get_process_triple()).split("-")[0]


def _instruction(builder: Any, name: str, table: Any, codes: Any) -> Any:
    from llvmlite import ir  # noqa: PLC0415

    kind = ir.FunctionType(codes.type, [table.type, codes.type])
    return builder.call(builder.module.declare_intrinsic(name, (), kind), [table, codes])


def _joined(builder: Any, bytes_: list[Any]) -> list[Any]:
    """Numbers from their bytes, the lowest first."""
    if len(bytes_) == 1:
        return bytes_
    middle = len(bytes_) // 2
    lows, highs = _joined(builder, bytes_[:middle]), _joined(builder, bytes_[middle:])
    return [part for low, high in zip(lows, highs, strict=True) for part in _in_turns(builder, low, high, 8 * middle)]


def _in_turns(builder: Any, left: Any, right: Any, width: int) -> list[Any]:
    """Numbers of ``left`` and of ``right`` beside each other: those in the lower half of each lane, then the others.

    A lane has 128 bits. Within lanes it is one instruction; across them it would be two.

    Args:
        builder: writes the instructions.
        left: 32 bytes.
        right: 32 bytes.
        width: of a number, in bits.
    """
    from llvmlite import ir  # noqa: PLC0415

    count, lane = 256 // width, 128 // width
    numbers = [builder.bitcast(side, ir.VectorType(ir.IntType(width), count)) for side in (left, right)]
    halves = [[*range(half, half + lane // 2), *range(lane + half, lane + half + lane // 2)] for half in (0, lane // 2)]
    turns = [_filled(32, [place for at in half for place in (at, at + count)]) for half in halves]
    return [builder.bitcast(builder.shuffle_vector(*numbers, turn), left.type) for turn in turns]
