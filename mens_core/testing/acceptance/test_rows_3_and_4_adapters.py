"""Rows 3 and 4: an adapter on disk keeps the logits, and a merged model has those of base and adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
from numpy.typing import NDArray

import mens_core
from mens_core.artifacts.adapter import write_adapter
from mens_core.artifacts.adapters import open_adapter
from mens_core.backend import Backend
from mens_core.exchange import IGNORE, Batch, TrainingState
from mens_core.hf.layout import GRAPHS
from mens_core.random_model import Size, write_random_weights
from mens_core.testing import tiny

Record = Any
# The runbook's models: width 16, four heads, two layers, vocabularies of 32 and 24.
SIZE = Size(width=16, layers=2, heads=4, kv_heads=2, head_dim=4, inner=24, positions=16)
#: The runbook's tolerances.
ROUNDTRIP, MERGED = 1e-5, 1e-4


def _row(*ids: int) -> Batch:
    tokens = np.array(ids, np.int32)
    return attrs.evolve(tiny.batch_of(len(ids)), input_ids=tokens, targets=np.full_like(tokens, IGNORE))


def _zeros(tensors: dict[str, NDArray[Any]]) -> TrainingState:
    return TrainingState(adapter={name: np.zeros_like(array) for name, array in tensors.items()}, optimizer={}, step=0)


def _distance(left: NDArray[Any], right: NDArray[Any]) -> float:
    return float(np.abs(left - right).max())


@pytest.mark.parametrize("family", GRAPHS)
def test_lora_checkpoint_roundtrip(backend: Backend, tmp_path: Path, family: str, record_property: Record) -> None:
    write_random_weights(tmp_path, arch=family, size=SIZE, vocab_size=32, like_trained=True)
    plan, row = tiny.plan_for(backend, tmp_path, rank=2, alpha=4.0), _row(1, 2, 3, 4, 5)
    session = backend.open(plan, tiny.SHAPE)
    tensors = tiny.random_adapter(backend.state(session).adapter)
    session = backend.restore(session, TrainingState(adapter=tensors, optimizer={}, step=0))
    before = backend.forward(session, row)
    write_adapter(tmp_path, tensors, plan)
    emptied = backend.forward(backend.restore(session, _zeros(tensors)), row)
    assert _distance(emptied, before) > ROUNDTRIP
    written = open_adapter(tmp_path)
    read = written.tensors()
    assert written.usual() == (2, 2.0)
    after = backend.forward(backend.restore(session, TrainingState(adapter=read, optimizer={}, step=0)), row)
    record_property("largest difference", _distance(after, before))
    # The runbook asks for 1e-5.
    np.testing.assert_array_equal(after, before)


@pytest.mark.parametrize("family", GRAPHS)
def test_merged_matches_lora_full_forward(
    backend: Backend, tmp_path: Path, family: str, record_property: Record
) -> None:
    base, adapter, merged = (tmp_path / name for name in ("base", "adapter", "merged"))
    base.mkdir()
    adapter.mkdir()
    write_random_weights(base, arch=family, size=SIZE, vocab_size=24, like_trained=True)
    plan, row = tiny.plan_for(backend, base, rank=3, alpha=6.0), _row(2, 5, 1, 3, 7)
    session = backend.open(plan, tiny.SHAPE)
    tensors = tiny.random_adapter(backend.state(session).adapter)
    session = backend.restore(session, TrainingState(adapter=tensors, optimizer={}, step=0))
    expected = backend.forward(session, row)
    write_adapter(adapter, tensors, plan)
    mens_core.merge([(adapter, 1.0)], base=base, output=merged, backend=backend.name)
    found = backend.forward(backend.open(tiny.plan_for(backend, merged), tiny.SHAPE), row)
    record_property("largest difference", _distance(found, expected))
    assert _distance(found, expected) < MERGED
    # The base alone is further away than any tolerance.
    assert _distance(backend.forward(backend.restore(session, _zeros(tensors)), row), expected) > 100 * MERGED
