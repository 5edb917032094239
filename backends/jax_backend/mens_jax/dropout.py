"""Dropout of what goes into an adapter (Hu et al. 2021, LoRA; Srivastava et al. 2014).

::

    contract ──▶ Dropout ──fold(step, batch)──▶ of a batch ──fold(layer, path)──▶ of a linear ──▶ kept(x): 0 or 1

A mask is a function of what was folded in and of an entry's place: nothing is drawn from a generator that lives on, so
nothing has to be saved, and the backward pass draws the same mask again instead of keeping it. Filling up a batch
leaves the masks of its tokens as they were. Probability, key and counters are arguments of the compiled function, so
that none of them is compiled in.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mens_core.contract import FineTuneContract

__all__ = ["Dropout", "dropout_of"]

# Of the keys; named, because a process may have chosen another one as its default.
_GENERATOR = "threefry2x32"
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["probability", "key"], meta_fields=[])
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Dropout:
    """Which entries are zeroed, as a function of a key.

    Attributes:
        probability: p, of an entry to be zeroed, in (0, 1); () float32.
        key: (2,) uint32.
    """

    probability: Array
    key: Array

    def fold(self, *parts: int | str | Array) -> Dropout:
        """The same under another key, derived from this one and the parts: counters and names."""
        key = jax.random.wrap_key_data(self.key, impl=_GENERATOR)
        for part in parts:
            key = jax.random.fold_in(key, _word(part) if isinstance(part, str) else part)
        return dataclasses.replace(self, key=jax.random.key_data(key))

    def kept(self, x: Array) -> Array:
        """1 where an entry of x (T, in) stays, 0 where it is zeroed; in the shape and format of x."""
        row, column = (jnp.arange(length, dtype=jnp.uint32) for length in x.shape)
        word = _threefry(self.key, row[:, None], column)
        # The upper 24 bits are a float32 exactly.
        return ((word >> 8).astype(jnp.float32) >= self.probability * (1 << 24)).astype(x.dtype)


def dropout_of(contract: FineTuneContract) -> Dropout | None:
    """The contract's dropout, keyed by its seed; None where nothing is dropped."""
    if not contract.adapter.dropout:
        return None
    start = hashlib.sha256(f"dropout:{contract.training.seed}".encode()).digest()
    key = np.frombuffer(start[:8], np.uint32)
    return Dropout(probability=np.float32(contract.adapter.dropout), key=key)  # type: ignore[arg-type]


def _word(name: str) -> int:
    """32 bits of a name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")


def _threefry(key: Array, left: Array, right: Array) -> Array:
    """The first word of Threefry-2x32 with 20 rounds (Salmon et al. 2011), as in ``jax.random``.

    XLA runs the library's on a CPU as a loop that writes every word to memory at each turn, several arrays as wide as
    the mask's input; written out it is fused with what reads it, and takes no memory and less time.

    Args:
        key: (2,) uint32.
        left: uint32, the first word of each counter.
        right: uint32, the second.
    """
    keys = (key[0], key[1], key[0] ^ key[1] ^ jnp.uint32(0x1BD11BDA))
    left, right = left + keys[0], right + keys[1]
    for block in range(5):
        for turn in _ROTATIONS[block % 2]:
            left = left + right
            right = ((right << turn) | (right >> (32 - turn))) ^ left
        left, right = left + keys[(block + 1) % 3], right + keys[(block + 2) % 3] + jnp.uint32(block + 1)
    return left
