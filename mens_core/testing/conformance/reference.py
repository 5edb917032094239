"""What the specification gives: the one place where the tests meet ``mens_core.testing.oracle``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mens_core.exchange import Batch, NF4Spec, QuantizedWeight, TrainingState
from mens_core.hf.keymap import linear_shapes
from mens_core.plan import ExecutionPlan
from mens_core.testing import oracle

__all__ = ["Reference", "adamw", "dequantize", "merged", "quantize"]

Arrays = Mapping[str, NDArray[Any]]


class Reference:
    """A plan's model in float64."""

    def __init__(self, plan: ExecutionPlan) -> None:
        quant, qlora = plan.contract.quant, plan.contract.adapter.method == "qlora"
        spec = NF4Spec(block_size=quant.block_size, double_quant=quant.double_quant)

        def stored(weight: NDArray[np.float32]) -> NDArray[np.float32]:
            return oracle.dequantize(oracle.quantize(weight, spec))

        adapter = plan.contract.adapter
        paths = linear_shapes(plan.layout) if adapter.has_patterns else ()
        scales = {path: adapter.scale_of(path) for path in paths}
        self._oracle = oracle.Oracle.open(
            plan.model_dir, scale=adapter.scale, scales=scales, stored=stored if qlora else None
        )

    def logits(self, adapter: Arrays, batch: Batch) -> NDArray[np.float64]:
        """(T, V)."""
        found: NDArray[np.float64] = self._oracle.logits(adapter, batch)
        return found

    def loss(self, adapter: Arrays, window: Sequence[Batch]) -> float:
        """Sum over the supervised tokens of all batches, in nats."""
        return float(sum(self._oracle.loss(adapter, batch) for batch in window))

    def slope(self, adapter: Arrays, window: Sequence[Batch], direction: Arrays) -> float:
        """Product of the gradient of the window's mean loss with a direction."""
        supervised = sum(batch.supervised_tokens for batch in window)

        def mean(point: Arrays) -> Any:
            return sum(self._oracle.loss(point, batch) for batch in window) / supervised

        return oracle.directional_derivative(mean, adapter, direction)


def adamw(
    before: TrainingState, gradient: Arrays, learning_rate: float, weight_decay: float
) -> tuple[Arrays, dict[str, NDArray[Any]]]:
    """The adapter and the moments after one update of a state that has moments, by their names in a state."""
    first, second = (
        {name: before.optimizer.get(f"{name}.{moment}", np.zeros_like(array)) for name, array in before.adapter.items()}
        for moment in ("exp_avg", "exp_avg_sq")
    )
    adapter, moments = oracle.adamw(
        before.adapter,
        gradient,
        oracle.Moments(exp_avg=first, exp_avg_sq=second, step=before.step),
        learning_rate=learning_rate,
        weight_decay=weight_decay,
    )
    optimizer = {f"{name}.exp_avg": array for name, array in moments.exp_avg.items()}
    return adapter, optimizer | {f"{name}.exp_avg_sq": array for name, array in moments.exp_avg_sq.items()}


def quantize(weight: NDArray[np.float32], spec: NF4Spec, offset: float | None) -> QuantizedWeight:
    """NF4; with the mean of the scales that the backend subtracted, whose last bits depend on the order of a sum."""
    return oracle.quantize(weight, spec, offset=offset)


def dequantize(quantized: QuantizedWeight) -> NDArray[np.float32]:
    """Codebook value times the block's absmax."""
    return oracle.dequantize(quantized)


def merged(
    weight: NDArray[np.float32], lora_a: NDArray[np.float32], lora_b: NDArray[np.float32], scale: float
) -> NDArray[np.float64]:
    """W + scale · B A."""
    return oracle.merged(weight, lora_a, lora_b, scale)
