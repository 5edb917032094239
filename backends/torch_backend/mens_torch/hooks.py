"""The hook implementations, but for ``mens_plan`` (``offer``). Each hands on to one function below."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from mens_core.exchange import Batch, BatchShape, GenerateSettings, NF4Spec, QuantizedWeight, StepMetrics, TrainingState
from mens_core.hookspecs import hookimpl
from mens_core.plan import ExecutionPlan
from mens_torch import decode, lora, quant, step

__all__ = [
    "mens_dequantize",
    "mens_forward",
    "mens_generate",
    "mens_loss",
    "mens_merge",
    "mens_open",
    "mens_quantize",
    "mens_restore",
    "mens_state",
    "mens_step",
]


@hookimpl
def mens_quantize(weight: NDArray[np.float32], spec: NF4Spec) -> QuantizedWeight:
    """See ``mens_core.hookspecs.mens_quantize``."""
    return quant.export_weight(quant.quantize(torch.tensor(weight), spec))


@hookimpl
def mens_dequantize(quantized: QuantizedWeight) -> NDArray[np.float32]:
    """See ``mens_core.hookspecs.mens_dequantize``."""
    return quant.dequantize(quant.import_weight(quantized, "cpu"), torch.float32).numpy()


@hookimpl
def mens_open(plan: ExecutionPlan, shape: BatchShape) -> step.Session:
    """See ``mens_core.hookspecs.mens_open``."""
    return step.open_session(plan, shape)


@hookimpl
def mens_forward(session: step.Session, batch: Batch) -> NDArray[np.float32]:
    """See ``mens_core.hookspecs.mens_forward``."""
    return step.forward(session, batch)


@hookimpl
def mens_loss(session: step.Session, batch: Batch) -> tuple[float, int]:
    """See ``mens_core.hookspecs.mens_loss``."""
    return step.loss(session, batch)


@hookimpl
def mens_step(session: step.Session, window: Sequence[Batch], learning_rate: float) -> StepMetrics:
    """See ``mens_core.hookspecs.mens_step``."""
    return step.step(session, window, learning_rate)


@hookimpl
def mens_state(session: step.Session) -> TrainingState:
    """See ``mens_core.hookspecs.mens_state``."""
    return step.state(session)


@hookimpl
def mens_restore(session: step.Session, state: TrainingState) -> step.Session:
    """See ``mens_core.hookspecs.mens_restore``."""
    return step.restore(session, state)


@hookimpl
def mens_generate(
    session: step.Session, prompt: Sequence[int], settings: GenerateSettings, on_token: Callable[[int], None] | None
) -> list[int]:
    """See ``mens_core.hookspecs.mens_generate``."""
    return decode.generate(session, prompt, settings, on_token)


@hookimpl
def mens_merge(
    weight: NDArray[np.float32], lora_a: NDArray[np.float32], lora_b: NDArray[np.float32], scale: float
) -> NDArray[np.float32]:
    """See ``mens_core.hookspecs.mens_merge``."""
    with warnings.catch_warnings():
        # Of arrays that are read-only, which torch has no notion of; a merge writes into none of them.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable", category=UserWarning)
        base, a, b = (torch.from_numpy(array) for array in (weight, lora_a, lora_b))
    return lora.merge(base, a, b, scale).numpy()
