"""The hook implementations: the only module the core reaches. Each hands on to one function below."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from mens_core.contract import FineTuneContract
from mens_core.errors import ContractError
from mens_core.exchange import (
    Batch,
    BatchShape,
    ExecutionPlan,
    GenerateSettings,
    KernelOffer,
    NF4Spec,
    QuantizedWeight,
    StepMetrics,
    TrainingState,
)
from mens_core.hf.layout import Layout
from mens_core.hookspecs import hookimpl
from mens_jax import decode, lora, quant, step
from mens_jax.device import pick_device, pick_dtype
from mens_jax.weights import unsupported

__all__ = [
    "mens_dequantize",
    "mens_forward",
    "mens_generate",
    "mens_loss",
    "mens_merge",
    "mens_open",
    "mens_plan",
    "mens_quantize",
    "mens_restore",
    "mens_state",
    "mens_step",
]


@hookimpl
def mens_plan(contract: FineTuneContract, layout: Layout) -> KernelOffer:
    """See ``mens_core.hookspecs.mens_plan``."""
    kernel = f"jax_{contract.adapter.method}"
    try:
        device = pick_device(contract.compute.device)
    except ContractError as error:
        return KernelOffer(kernel=kernel, feasible=False, reason=str(error))
    reason = unsupported(layout)
    if reason is not None:
        return KernelOffer(kernel=kernel, feasible=False, reason=reason)
    return KernelOffer(kernel=kernel, feasible=True, device=device, dtype=pick_dtype(contract.compute.dtype, device))


@hookimpl
def mens_quantize(weight: NDArray[np.float32], spec: NF4Spec) -> QuantizedWeight:
    """See ``mens_core.hookspecs.mens_quantize``."""
    return quant.export_weight(quant.quantize(jnp.asarray(weight), spec))


@hookimpl
def mens_dequantize(quantized: QuantizedWeight) -> NDArray[np.float32]:
    """See ``mens_core.hookspecs.mens_dequantize``."""
    return np.array(quant.dequantize(quant.import_weight(quantized, "cpu"), jnp.float32))


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
def mens_generate(session: step.Session, prompt: Sequence[int], settings: GenerateSettings) -> list[int]:
    """See ``mens_core.hookspecs.mens_generate``."""
    return decode.generate(session, prompt, settings)


@hookimpl
def mens_merge(
    weight: NDArray[np.float32], lora_a: NDArray[np.float32], lora_b: NDArray[np.float32], scale: float
) -> NDArray[np.float32]:
    """See ``mens_core.hookspecs.mens_merge``."""
    return np.array(lora.merge(jnp.asarray(weight), jnp.asarray(lora_a), jnp.asarray(lora_b), scale))
