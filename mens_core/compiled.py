"""Loops over numbers that numba compiles when they are first run, and the sharing of one among threads."""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

__all__ = ["MANY", "compiled", "in_shares", "shares"]

_Result = TypeVar("_Result")

MANY = 1 << 16
"""Numbers from which a loop over them repays that it is called from Python, and in a run that it is compiled."""
# Numbers for which one more thread pays.
_SHARE = 1 << 20


@functools.cache
def compiled(function: Callable[..., Any], *, in_any_order: bool = False) -> Callable[..., Any]:
    """A function as machine code that lets go of the interpreter's lock; kept on disk for the next process.

    Args:
        function: loops over numbers and arrays.
        in_any_order: whether its sums may be taken in another order, and a product added without being rounded.
    """
    # Imported on use: it takes 0.2 s and 70 MiB, and few runs need it.
    import numba  # noqa: PLC0415

    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    if in_any_order:
        options["fastmath"] = {"reassoc", "contract", "nsz"}
    try:
        machine_code: Callable[..., Any] = numba.njit(cache=True, **options)(function)
    except RuntimeError:
        # No folder can be written, neither beside the function's file nor the user's own: anew in each process.
        machine_code = numba.njit(**options)(function)
    return machine_code


def in_shares(task: Callable[[int, int], _Result], blocks: int, block_size: int, threads: int) -> list[_Result]:
    """What ``task(first, last)`` gives for ranges that cover all blocks.

    Args:
        task: works on blocks ``first`` to ``last``, at the same time as on others.
        blocks: how many there are.
        block_size: numbers in a block; few numbers are not worth a thread.
        threads: at most so many.
    """
    count = shares(blocks * block_size, threads)
    if count == 1:
        return [task(0, blocks)]
    edges = [blocks * share // count for share in range(count + 1)]
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(task, edges[:-1], edges[1:]))


def shares(numbers: int, threads: int) -> int:
    """How many threads, of at most so many, are worth so many numbers; one at least."""
    return max(1, min(threads, numbers // _SHARE))
