"""Measure once how fast a kernel runs here: real steps of small random models, and what each kind of work cost.

    probes ──▶ model folder ─▶ open ─▶ restore ─▶ steps, timed ──▶ least squares over ``costs.COSTS`` ──▶ speeds.json

Each probe is made of one kind of work more than of others, so that the timings tell them apart. Lengths are multiples
of 16 and windows are whole, so that a backend that fills batches up has nothing to fill.
"""

from __future__ import annotations

import datetime
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import attrs
import numpy as np
from numpy.typing import NDArray

from mens_core.artifacts.adapter import initial_state
from mens_core.artifacts.tensors import open_tensors
from mens_core.backend import Backend
from mens_core.contract import FineTuneContract
from mens_core.costs import COSTS, step_costs
from mens_core.exchange import BaseWeights, Batch, Speed, Workload
from mens_core.hf.keymap import linear_shapes
from mens_core.machine import this_machine
from mens_core.planner import resolve
from mens_core.random_model import Size, write_random_weights
from mens_core.speeds import store_speed
from mens_core.text.encode import TokenRow
from mens_core.text.pack import pack, run_shape

__all__ = ["fit_seconds", "measure_speed"]

# Once to compile and to warm up, then the least of these: what disturbs a step only ever makes it longer.
_REPEATS = 3


@attrs.frozen(kw_only=True)
class _Probe:
    """A model and a batch; ``batches`` are the numbers of such batches in the windows that are timed."""

    arch: str
    size: Size
    vocab_size: int
    rows: int
    length: int
    supervised: int
    rank: int = 16
    batches: tuple[int, ...] = (1,)


def _size(width: int, layers: int, inner: int, kv_heads: int) -> Size:
    heads = width // 64
    return Size(width=width, layers=layers, heads=heads, kv_heads=kv_heads, head_dim=64, inner=inner, positions=2048)


_PROBES = (
    # products and elementwise work; a second batch tells what a step costs from what a batch costs
    _Probe(
        arch="gpt2",
        size=_size(768, 2, 3072, 12),
        vocab_size=2048,
        rows=4,
        length=128,
        supervised=32,
        batches=(1, 2),
    ),
    # few tokens: the weights' way to the multiplier, and calls
    _Probe(arch="llama", size=_size(512, 4, 1376, 8), vocab_size=512, rows=1, length=16, supervised=16),
    _Probe(arch="gpt2", size=_size(128, 12, 512, 2), vocab_size=512, rows=1, length=32, supervised=16),
    # long rows: attention
    _Probe(arch="llama", size=_size(512, 1, 512, 4), vocab_size=512, rows=1, length=1024, supervised=16),
    # a wide vocabulary, all of it supervised
    _Probe(arch="qwen2", size=_size(256, 1, 512, 4), vocab_size=32768, rows=2, length=128, supervised=112),
    # elementwise work and thin products, with a wide adapter and many updates
    _Probe(arch="llama", size=_size(512, 2, 2048, 8), vocab_size=512, rows=2, length=256, supervised=16, rank=64),
    _Probe(arch="llama", size=_size(384, 3, 1024, 2), vocab_size=512, rows=8, length=64, supervised=16, rank=8),
)


def measure_speed(kernel: str, *, device: str = "auto", dtype: str = "auto", file: Path | None = None) -> Speed:
    """Measure a kernel, keep the result for the planner, and return it. Takes some ten to twenty seconds on a CPU.

    Args:
        kernel: ``<backend>_<method>``.
        device: as the contract takes it.
        dtype: as the contract takes it.
        file: where to keep it, instead of ``speeds.speeds_file()``.

    Raises:
        MensError: if the backend cannot be used, or cannot run a plain model on the device.
        OSError: if the result cannot be written.
    """
    timed: list[tuple[Mapping[str, float], float]] = []
    key = ""
    for probe in _PROBES:
        with tempfile.TemporaryDirectory() as folder:
            write_random_weights(Path(folder), arch=probe.arch, size=probe.size, vocab_size=probe.vocab_size)
            contract = FineTuneContract.from_fields(
                trains=False,
                model=folder,
                tokenizer="lab",
                backend=kernel,
                device=device,
                dtype=dtype,
                rank=probe.rank,
                alpha=2.0 * probe.rank,
            )
            for costs, seconds, key in _timings(probe, contract):
                timed.append((costs, seconds))
    counts, seconds = [costs for costs, _ in timed], [taken for _, taken in timed]
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    speed = Speed(seconds=fit_seconds(counts, seconds), source=f"measured here on {today}")
    store_speed(key, speed, this_machine(), file)
    return speed


def fit_seconds(costs: Sequence[Mapping[str, float]], seconds: Sequence[float]) -> dict[str, float]:
    """Seconds per unit of each kind of work, none negative, with the least sum of squared relative errors.

    Args:
        costs: of each timed step, from ``costs.step_costs``.
        seconds: that each took, positive.
    """
    counts = np.array([[cost[name] for name in COSTS] for cost in costs]) / np.array(seconds)[:, None]
    # Columns of like size, so that one threshold serves them all.
    units = np.maximum(counts.max(axis=0), np.finfo(np.float64).tiny)
    found = _non_negative(counts / units, np.ones(len(counts))) / units
    return {name: float(value) for name, value in zip(COSTS, found, strict=True)}


def _non_negative(matrix: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.float64]:
    """x ≥ 0 with the least |matrix x - target| (Lawson & Hanson 1974, Solving Least Squares Problems, chapter 23)."""
    found = np.zeros(matrix.shape[1])
    free = np.zeros(matrix.shape[1], bool)
    for _ in range(3 * len(found)):
        slope = matrix.T @ (target - matrix @ found)
        slope[free] = -np.inf
        if slope.max() <= 1e-9:
            break
        free[slope.argmax()] = True
        while True:
            best = np.zeros_like(found)
            best[free] = np.linalg.lstsq(matrix[:, free], target, rcond=None)[0]
            if best[free].min() > 0:
                break
            # As far towards it as nothing turns negative; what reaches zero is held there.
            low = free & (best <= 0)
            share = (found[low] / (found[low] - best[low])).min()
            found += share * (best - found)
            free &= found > 1e-15
            if not free.any():
                return found
        found = best
    return found


def _timings(probe: _Probe, contract: FineTuneContract) -> Iterator[tuple[dict[str, float], float, str]]:
    """(costs, seconds, key of the speed) of each of the probe's windows."""
    plan, backend = resolve(contract, trains=False)
    rows = _rows(probe)
    most = max(probe.batches)
    shape = run_shape(rows * most, batch_size=probe.rows, grad_accum=most, seed=0, epochs=1)
    session = backend.open(plan, shape)
    session = backend.restore(session, initial_state(backend.state(session).adapter, seed=0))
    headers = open_tensors(plan.model_dir).headers
    weights = BaseWeights(
        parameters=sum(int(np.prod(info.shape)) for info in headers.values()),
        stored_bytes=sum(info.stop - info.start for info in headers.values()),
        linears=linear_shapes(plan.layout),
    )
    for count in probe.batches:
        window = [pack(rows)] * count
        steps = [_step(backend, session, window) for _ in range(1 + _REPEATS)]
        work = Workload(
            shape=shape,
            batches=count,
            tokens=count * probe.rows * probe.length,
            supervised=count * probe.rows * probe.supervised,
            pairs=count * probe.rows * probe.length**2,
            rows=count * probe.rows,
            steps=1,
            source="a probe",
        )
        costs = step_costs(plan.layout, weights, contract, work)
        yield costs, min(steps[1:]), f"{plan.execution_kernel} {plan.device} {plan.dtype}"


def _rows(probe: _Probe) -> list[TokenRow]:
    random = np.random.Generator(np.random.Philox(key=0))
    return [
        TokenRow(
            random.integers(0, 256, probe.length, dtype=np.int32),
            np.arange(probe.length) >= probe.length - probe.supervised,
        )
        for _ in range(probe.rows)
    ]


def _step(backend: Backend, session: object, window: Sequence[Batch]) -> float:
    """Seconds of one step, its loss read."""
    begun = time.perf_counter()
    float(backend.step(session, window, 1e-4).loss_sum)
    return time.perf_counter() - begun
