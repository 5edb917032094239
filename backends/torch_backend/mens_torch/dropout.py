"""Dropout of what goes into an adapter (Hu et al. 2021, LoRA; Srivastava et al. 2014).

::

    contract ──▶ Dropout ──fold(step, batch)──▶ of a batch ──fold(module path)──▶ of a linear ──▶ kept(x): 0 or 1

A mask is a function of what was folded in and of the shape: nothing is drawn from a generator that lives on, so
nothing has to be saved, and the backward pass draws the same mask again instead of keeping it.
"""

from __future__ import annotations

import hashlib

import attrs
import torch
from torch import Tensor as Array

from mens_core.contract import FineTuneContract

__all__ = ["Dropout", "dropout_of"]


@attrs.frozen(kw_only=True, eq=False)
class Dropout:
    """Which entries are zeroed, as a function of a key.

    Attributes:
        probability: p, of an entry to be zeroed, in (0, 1).
        key: 32 bytes.
    """

    probability: float
    key: bytes

    def fold(self, *parts: int | str) -> Dropout:
        """The same under another key, derived from this one and the parts: counters and names."""
        key = self.key
        for part in parts:
            key = hashlib.sha256(key + repr(part).encode()).digest()
        return attrs.evolve(self, key=key)

    def kept(self, x: Array) -> Array:
        """1 where an entry of x stays, 0 where it is zeroed; in the shape, format and place of x.

        PyTorch's generator on a CPU looks at 32 bits of the key, so that two masks in 2³² are alike.
        """
        generator = torch.Generator(x.device).manual_seed(int.from_bytes(self.key[:8], "little", signed=True))
        # Several times as fast on a CPU as bernoulli_, and as fast elsewhere.
        drawn = torch.rand(x.shape, generator=generator, device=x.device, dtype=torch.float32)
        return drawn.ge_(self.probability).to(x.dtype)


def dropout_of(contract: FineTuneContract) -> Dropout | None:
    """The contract's dropout, keyed by its seed; None where nothing is dropped."""
    if not contract.adapter.dropout:
        return None
    start = hashlib.sha256(f"dropout:{contract.training.seed}".encode()).digest()
    return Dropout(probability=contract.adapter.dropout, key=start)
