"""What the witnesses are asked about: seeded batches, adapters, optimizer states and weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from mens_core.exchange import IGNORE, Batch, BatchShape, TrainingState
from mens_core.hf.layout import Layout
from mens_core.text.pack import pack
from mens_core.text.tokens import TokenRow, TokenRows

__all__ = ["Material", "adapter_like", "joined", "state_like"]

Arrays = Mapping[str, NDArray[np.float32]]

_LENGTHS = (9, 3, 12, 5, 2, 7, 4, 11, 6, 8, 3)
_SHARES = (0.9, 0.4, 0.5, 1.0, 1.0, 0.3, 0.8, 0.3, 0.6, 0.0, 1.0)
"""Share of each row's tokens that are supervised; one row is masked altogether."""


@attrs.frozen(kw_only=True)
class Material:
    """Eleven rows of uneven length over a model's vocabulary.

    Attributes:
        rows: each a batch by itself.
    """

    rows: tuple[Batch, ...]

    @classmethod
    def of(cls, layout: Layout, seed: int = 0) -> Material:
        """Rows that fit the model."""
        generator = np.random.Generator(np.random.Philox(key=seed))
        rows = []
        for length, share in zip(_LENGTHS, _SHARES, strict=True):
            count = min(length, layout.max_positions)
            ids = generator.integers(0, layout.vocab_size, count, dtype=np.int32)
            rows.append(pack(TokenRows.of([TokenRow(ids, generator.random(count) < share)])))
        return cls(rows=tuple(rows))

    @property
    def shape(self) -> BatchShape:
        """Of the largest batch and window that anything here makes of the rows."""
        return BatchShape(
            rows=8,
            tokens=64,
            longest_row=max(len(row.input_ids) for row in self.rows),
            supervised=64,
            batches=8,
        )

    @property
    def batch(self) -> Batch:
        """Six of the rows packed, among them the one that is masked altogether."""
        return joined([*self.rows[:5], self.rows[9]])

    @property
    def silent(self) -> Batch:
        """The same with nothing supervised."""
        return attrs.evolve(self.batch, targets=np.full_like(self.batch.targets, IGNORE))

    def windows(self, size: int) -> list[list[Batch]]:
        """The rows as windows of at most eight, in batches of ``size`` rows; the last window is a partial one."""
        parts = [self.rows[:8], self.rows[8:]]
        return [[joined(part[at : at + size]) for at in range(0, len(part), size)] for part in parts]


def joined(rows: Sequence[Batch]) -> Batch:
    """Batches packed into one."""
    names = ("input_ids", "positions", "targets", "row_lengths")
    return Batch(**{name: np.concatenate([getattr(row, name) for row in rows]) for name in names})


def adapter_like(adapter: Arrays, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """Normal numbers under the names and shapes of an adapter, A of size 1 / √in and B of size 0.1, neither zero.

    What is trained whole is what it was, and numbers of size 0.1.
    """
    generator = np.random.Generator(np.random.Philox(key=seed))
    drawn = {name: generator.standard_normal(array.shape, np.float32) for name, array in adapter.items()}
    return {
        name: array * np.float32(array.shape[1] ** -0.5 if name.endswith(".lora_A.weight") else 0.1)
        + (np.float32(0) if ".lora_" in name else adapter[name])
        for name, array in drawn.items()
    }


def state_like(adapter: Arrays, seed: int = 1) -> TrainingState:
    """The adapter in the middle of a run: moments that are not small, so that an update is well conditioned.

    From zero moments Adam's first step is the gradient's sign, which an entry near zero takes from its rounding.
    """
    generator = np.random.Generator(np.random.Philox(key=seed))
    optimizer: dict[str, Any] = {}
    for name, array in adapter.items():
        optimizer[f"{name}.exp_avg"] = np.float32(0.01) * generator.standard_normal(array.shape, np.float32)
        root = np.float32(0.02) * (np.float32(0.5) + generator.random(array.shape, np.float32))
        optimizer[f"{name}.exp_avg_sq"] = root * root
    return TrainingState(adapter=dict(adapter), optimizer=optimizer, step=7)
