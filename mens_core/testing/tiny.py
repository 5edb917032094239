"""Tiny models with logits of an honest size, packed batches, and plans made by hand. No framework is needed.

The weights are drawn so that logits reach about 10, as a trained model's do: on logits near zero every mistake
is small, and a tolerance would prove nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from mens_core.backend import Backend
from mens_core.contract import LABELS, FineTuneContract
from mens_core.exchange import IGNORE, Batch, BatchShape, NF4Spec
from mens_core.hf.inventory import middle_coverage, read_inventory
from mens_core.hf.layout import read_layout
from mens_core.plan import BaseWeights, ExecutionPlan, Machine, Workload
from mens_core.random_model import Size, write_random_weights

__all__ = [
    "MACHINE",
    "SHAPE",
    "VOCABULARY",
    "WORKLOAD",
    "batch_of",
    "nf4_spec",
    "packed",
    "plan_for",
    "random_adapter",
    "rows_of",
    "with_tokens",
    "write_model",
]

Arrays = Mapping[str, NDArray[Any]]

VOCABULARY = 97
SHAPE = BatchShape(rows=8, tokens=64, longest_row=24, supervised=64, batches=8)
MACHINE = Machine(platform="test", processor="test", python="3", cpu_count=1, memory_bytes=1 << 34)
WORKLOAD = Workload(
    shape=SHAPE,
    batches=2.0,
    tokens=100.0,
    supervised=60.0,
    pairs=1600.0,
    rows=40,
    row_tokens=16.0,
    steps=10,
    source="made by hand",
)

# Heads together wider than the model, and 51 · 48 weights in a linear: no whole number of blocks of 64.
_SIZE = Size(width=48, layers=2, heads=4, kv_heads=2, head_dim=14, inner=51, positions=64)


def write_model(folder: Path, family: str, seed: int = 0) -> Path:
    """Write config.json and model.safetensors, float32.

    Args:
        folder: does not exist yet.
        family: one of ``GRAPHS``.
        seed: of the weights.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True)
    write_random_weights(folder, arch=family, size=_SIZE, vocab_size=VOCABULARY, seed=seed, like_trained=True)
    return folder


def plan_for(backend: Backend, folder: Path, **fields: Any) -> ExecutionPlan:
    """A plan of this backend for a model folder: on the CPU, with rank 4 and scale 2 unless told otherwise."""
    fields = {"device": "cpu", "rank": 4, "alpha": 8.0} | fields
    contract = FineTuneContract.from_fields(trains=False, model=str(folder), **fields)
    layout, inventory = read_layout(folder), read_inventory(folder, None)
    weights = BaseWeights(
        parameters=inventory.parameters, stored_bytes=inventory.stored_bytes, linears=inventory.linears
    )
    offer = backend.plan(contract, layout, MACHINE, weights, None)
    assert offer.feasible, offer.reason
    method = contract.adapter.method
    return ExecutionPlan(
        contract=contract,
        layout=layout,
        backend=backend.name,
        execution_kernel=offer.kernel,
        runbook_kernel=LABELS[method],
        candle_compat_mode=method == "qlora",
        contract_digest="",
        model_name=str(folder),
        model_dir=folder,
        tokenizer="hf",
        device=offer.device,
        dtype=offer.dtype,
        contents={},
        weights=weights,
        coverage=middle_coverage(layout, (), method),
        limit_bytes=MACHINE.memory_bytes,
        offers=(offer,),
    )


def nf4_spec() -> NF4Spec:
    """The spec of a contract's defaults."""
    return NF4Spec(block_size=64, double_quant=True)


def batch_of(*lengths: int, seed: int = 0, supervised: float = 0.6) -> Batch:
    """Rows of random tokens, packed; each position but a row's last is supervised with this probability."""
    generator = np.random.default_rng(seed)
    rows = [generator.integers(3, VOCABULARY, length) for length in lengths]
    targets = [
        np.append(np.where(generator.random(len(row) - 1) < supervised, row[1:], IGNORE), IGNORE) for row in rows
    ]
    return Batch(
        input_ids=np.concatenate(rows).astype(np.int32),
        positions=np.concatenate([np.arange(len(row)) for row in rows]).astype(np.int32),
        targets=np.concatenate(targets).astype(np.int32),
        row_lengths=np.array(lengths, np.int32),
    )


def with_tokens(batch: Batch, tokens: NDArray[np.int32]) -> Batch:
    """The batch with other tokens, nothing supervised."""
    return attrs.evolve(batch, input_ids=tokens, targets=np.full_like(tokens, IGNORE))


def rows_of(batch: Batch) -> list[Batch]:
    """Each row of a batch as a batch of its own."""
    ends = np.cumsum(batch.row_lengths)
    return [
        Batch(
            input_ids=batch.input_ids[end - length : end],
            positions=batch.positions[end - length : end],
            targets=batch.targets[end - length : end],
            row_lengths=np.array([length], np.int32),
        )
        for end, length in zip(ends, batch.row_lengths, strict=True)
    ]


def packed(rows: Iterable[Batch]) -> Batch:
    """Batches packed into one; the inverse of ``rows_of``."""
    rows = list(rows)
    return Batch(
        **{
            name: np.concatenate([getattr(row, name) for row in rows])
            for name in ("input_ids", "positions", "targets", "row_lengths")
        }
    )


def random_adapter(adapter: Arrays, seed: int = 0, size: float = 0.1) -> dict[str, NDArray[np.float32]]:
    """Normal numbers under the names and shapes of an adapter; those of modules trained whole are added to it."""
    generator = np.random.default_rng(seed)
    return {
        name: ((0 if ".lora_" in name else array) + size * generator.standard_normal(array.shape)).astype(np.float32)
        for name, array in adapter.items()
    }
