"""Logits and losses: every witness against every other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mens_core.exchange import Batch
from mens_core.parity.bounds import LOGITS, LOSS
from mens_core.parity.comparison import Comparison, apart
from mens_core.parity.material import Material
from mens_core.parity.witness import Witness

__all__ = ["compare_graphs", "compare_logits", "compare_loss"]

Arrays = Mapping[str, NDArray[Any]]


def compare_graphs(
    left: Witness, right: Witness, adapter: Arrays, material: Material, layers: int
) -> Iterator[Comparison]:
    """Logits without and with the adapter's pairs, packed rows and a row alone; losses, masked in part and altogether.

    What is trained whole is a part of the base here.
    """
    zero = {name: np.zeros_like(array) if ".lora_" in name else array for name, array in adapter.items()}
    yield compare_logits("logits of the base", left, right, zero, material.batch, layers)
    yield compare_logits("logits with the adapter", left, right, adapter, material.batch, layers)
    yield compare_logits("logits of a row alone", left, right, adapter, material.rows[0], layers)
    yield compare_loss("loss of packed rows, one masked", left, right, adapter, material.batch, layers)
    yield compare_loss("loss of a row alone", left, right, adapter, material.rows[0], layers)
    yield compare_loss("loss with nothing supervised", left, right, adapter, material.silent, layers)


def compare_logits(what: str, left: Witness, right: Witness, adapter: Arrays, batch: Batch, layers: int) -> Comparison:
    """Every logit, in multiples of the largest."""
    expected = right.logits(adapter, batch)
    found = (left.name, left.logits(adapter, batch))
    return apart(what, found, (right.name, expected), LOGITS.for_depth(layers), float(np.abs(expected).max()))


def compare_loss(what: str, left: Witness, right: Witness, adapter: Arrays, batch: Batch, layers: int) -> Comparison:
    """The sum of the cross-entropies, in multiples of itself."""
    expected = right.loss(adapter, batch)
    found = (left.name, left.loss(adapter, batch))
    return apart(what, found, (right.name, expected), LOSS.for_depth(layers), abs(expected) or 1.0)
