"""Measure once how fast a kernel runs here: real steps of small random models, and what each kind of work cost.

    probes ──▶ model folder ─▶ open ─▶ restore ─▶ steps, timed ──▶ least squares over ``costs.COSTS`` ──▶ speeds.json

Each probe is made of one kind of work more than of others, so that the timings tell them apart. Lengths are multiples
of 16 and windows are whole, so that a backend that fills batches up has nothing to fill.
"""

from __future__ import annotations

import datetime as dt
import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import attrs
import numpy as np
from numpy.typing import NDArray

from mens_core.artifacts.adapter import initial_state
from mens_core.backend import Backend
from mens_core.contract import METHODS, FineTuneContract
from mens_core.costs import COSTS, step_costs
from mens_core.exchange import Batch
from mens_core.hf.keymap import linear_shapes, tensor_shapes
from mens_core.machine import this_machine
from mens_core.plan import BaseWeights, ExecutionPlan, Speed, Workload
from mens_core.planner import resolve
from mens_core.plugins import installed_backends
from mens_core.random_model import Size, write_random_weights
from mens_core.speeds import store_speed
from mens_core.text.pack import Batching, pack
from mens_core.text.tokens import TokenRow, TokenRows

__all__ = ["fit_seconds", "measure_speed", "measure_speeds"]

# Once to compile and to warm up, then the least of these: what disturbs a step only ever makes it longer.
_REPEATS = 3

# Seconds per unit on one core of a server of 2024; only their proportions matter here.
_COMMON = {
    "products": 1e-11,
    "adapter": 1e-11,
    "attention": 9e-12,
    "elementwise": 1.5e-9,
    "logits": 2.5e-9,
    "weights": 8e-10,
    "layers": 1e-3,
    "updates": 5e-9,
}
_DRAWN = 0.03


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
        rows=2,
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
)


def measure_speeds() -> Iterator[tuple[str, Speed]]:
    """Measure every kernel whose packages are here; yields (kernel, speed) as each is done.

    Raises:
        MensError: as ``measure_speed`` does.
    """
    for info in installed_backends():
        for method in METHODS if not info.missing else ():
            kernel = f"{info.name}_{method}"
            yield kernel, measure_speed(kernel)


def measure_speed(kernel: str, *, device: str = "auto", dtype: str = "auto", file: Path | None = None) -> Speed:
    """Measure a kernel, keep the result for the planner, and return it. Takes half a minute or less on a CPU.

    Args:
        kernel: ``<backend>_<method>``.
        device: as the contract takes it.
        dtype: as the contract takes it.
        file: where to keep it, instead of ``speeds.speeds_file()``.

    Raises:
        MensError: if the backend cannot be used, or cannot run a plain model on the device.
        OSError: if the result cannot be written.
    """
    costs: list[Mapping[str, float]] = []
    seconds: list[float] = []
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
            )
            plan, backend = resolve(contract, trains=False)
            for work, taken in _timings(probe, plan, backend):
                costs.append(work)
                seconds.append(taken)
    today = dt.datetime.now(tz=dt.UTC).astimezone().date()
    speed = Speed(seconds=fit_seconds(costs, seconds), source=f"measured here on {today}")
    store_speed(f"{plan.execution_kernel} {plan.device} {plan.dtype}", speed, this_machine(), file)
    return speed


def fit_seconds(costs: Sequence[Mapping[str, float]], seconds: Sequence[float]) -> dict[str, float]:
    """Seconds per unit of each kind of work, none negative, with the least sum of squared relative errors.

    What the timings do not settle keeps the proportion it has on a common machine: each kind's ratio to that is drawn
    towards the timings' median ratio (Hoerl & Kennard 1970, ridge regression), so lightly that a factor of two weighs
    as much as an error of 3 % in one timing.

    Args:
        costs: of each timed step, from ``costs.step_costs``.
        seconds: that each took, positive.
    """
    common = np.array([_COMMON[name] for name in COSTS])
    # Shares of each step's time that the common machine would spend on each kind of work.
    shares = np.array([[cost[name] for name in COSTS] for cost in costs]) * common / np.array(seconds)[:, None]
    scale = 1.0 / np.median(shares.sum(axis=1))
    matrix = np.vstack([shares * scale, _DRAWN * np.eye(len(COSTS))])
    target = np.append(np.ones(len(shares)), np.full(len(COSTS), _DRAWN))
    found = _non_negative(matrix, target) * scale * common
    return {name: float(value) for name, value in zip(COSTS, found, strict=True)}


def _non_negative(matrix: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.float64]:
    """The x ≥ 0 with the least |matrix x - target| (Lawson & Hanson 1974, Solving Least Squares, ch. 23)."""
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


def _timings(probe: _Probe, plan: ExecutionPlan, backend: Backend) -> Iterator[tuple[dict[str, float], float]]:
    """(costs, seconds) of each of the probe's windows."""
    rows, most = _rows(probe), max(probe.batches)
    shape = Batching(batch_size=probe.rows, grad_accum=most, seed=0).shape(TokenRows.of(rows * most), 1)
    session = backend.open(plan, shape)
    session = backend.restore(session, initial_state(backend.state(session).adapter, seed=0))
    parameters = sum(math.prod(tensor) for tensor in tensor_shapes(plan.layout).values())
    weights = BaseWeights(parameters=parameters, stored_bytes=4 * parameters, linears=linear_shapes(plan.layout))
    for count in probe.batches:
        window = [pack(TokenRows.of(rows))] * count
        steps = [_step(backend, session, window, on_cpu=plan.device == "cpu") for _ in range(1 + _REPEATS)]
        work = Workload(
            shape=shape,
            batches=count,
            tokens=count * probe.rows * probe.length,
            supervised=count * probe.rows * probe.supervised,
            pairs=count * probe.rows * probe.length**2,
            rows=count * probe.rows,
            row_tokens=probe.length,
            steps=1,
            source="a probe",
        )
        yield step_costs(plan.layout, weights, plan.contract, work), min(steps[1:])


def _rows(probe: _Probe) -> list[TokenRow]:
    random = np.random.Generator(np.random.Philox(key=0))
    return [
        TokenRow(
            random.integers(0, 256, probe.length, dtype=np.int32),
            np.arange(probe.length) >= probe.length - probe.supervised,
        )
        for _ in range(probe.rows)
    ]


def _step(backend: Backend, session: object, window: Sequence[Batch], *, on_cpu: bool) -> float:
    """Seconds of one step, its loss read.

    On a CPU what other processes took away does not count: of one thread, a step's own time is the processor's; of
    several, whose times add up, it is the elapsed time.
    """
    begun, spent = time.perf_counter(), time.process_time()
    float(backend.step(session, window, 1e-4).loss_sum)
    elapsed, processor = time.perf_counter() - begun, time.process_time() - spent
    return min(elapsed, processor) if on_cpu else elapsed
