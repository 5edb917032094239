"""Who answers: a backend through its hooks, or the specification. Both take the adapter as an argument."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import attrs
import numpy as np
from numpy.typing import NDArray

from mens_core.backend import Backend
from mens_core.errors import ModelError
from mens_core.exchange import Batch, BatchShape, NF4Spec, TrainingState
from mens_core.hf.keymap import linear_shapes
from mens_core.hf.layout import GRAPHS, Layout
from mens_core.plan import ExecutionPlan
from mens_core.testing.oracle import Oracle, dequantize, quantize
from mens_core.testing.oracle.layers import ACTIVATIONS
from mens_core.testing.oracle.optimizer import BETA1
from mens_core.testing.oracle.rotary import inverse_frequencies

__all__ = ["BackendWitness", "OracleWitness", "Step", "Witness", "obstacle_to_oracle"]

Arrays = Mapping[str, NDArray[Any]]

# A float64 forward pass of this many parameters over sixty tokens takes about a second on one core; there are hundreds.
_MOST_PARAMETERS = 1 << 24


class Witness(Protocol):
    """Somebody who knows logits and losses."""

    @property
    def name(self) -> str:
        """For people."""

    def logits(self, adapter: Arrays, batch: Batch) -> NDArray[Any]:
        """(T, V)."""

    def loss(self, adapter: Arrays, batch: Batch) -> float:
        """Sum over the supervised tokens, in nats."""


@attrs.frozen(kw_only=True)
class Step:
    """What one optimizer step told.

    Attributes:
        loss: sum over the window's supervised tokens, in nats.
        norm: of the mean gradient before clipping.
        before: adapter and optimizer before it.
        after: adapter and optimizer after it.
    """

    loss: float
    norm: float
    before: TrainingState
    after: TrainingState


@attrs.frozen(kw_only=True, eq=False)
class BackendWitness:
    """A backend with a session that is open.

    Attributes:
        backend: loaded.
        plan: what the session was opened for.
        session: the backend's own.
    """

    backend: Backend
    plan: ExecutionPlan
    session: Any

    @classmethod
    def open(cls, plan: ExecutionPlan, backend: Backend, shape: BatchShape) -> BackendWitness:
        """Load the base; the adapter is set before every answer."""
        return cls(backend=backend, plan=plan, session=backend.open(plan, shape))

    @property
    def name(self) -> str:
        """As ``--backend`` takes it."""
        return self.backend.name

    @property
    def empty_adapter(self) -> Arrays:
        """Names and shapes."""
        return self.backend.state(self.session).adapter

    def logits(self, adapter: Arrays, batch: Batch) -> NDArray[np.float32]:
        """``mens_forward``."""
        return self.backend.forward(self._with(adapter), batch)

    def loss(self, adapter: Arrays, batch: Batch) -> float:
        """``mens_loss``."""
        return self.backend.loss(self._with(adapter), batch)[0]

    def gradient(self, adapter: Arrays, window: Sequence[Batch]) -> tuple[dict[str, NDArray[np.float64]], Step]:
        """The clipped gradient of the window's mean loss: from zero, AdamW's first moment becomes (1 - β₁) g."""
        fresh = TrainingState(adapter=adapter, optimizer={}, step=0)
        (step,) = self.steps(fresh, [window], [0.0])
        moments = step.after.optimizer
        gradient = {name: moments[f"{name}.exp_avg"].astype(np.float64) / (1 - BETA1) for name in adapter}
        return gradient, step

    def steps(self, start: TrainingState, windows: Sequence[Sequence[Batch]], rates: Sequence[float]) -> list[Step]:
        """``mens_step`` for each window."""
        session, before, told = self.backend.restore(self.session, start), start, []
        for window, rate in zip(windows, rates, strict=True):
            metrics = self.backend.step(session, window, rate)
            after = self.backend.state(session)
            told.append(Step(loss=float(metrics.loss_sum), norm=float(metrics.grad_norm), before=before, after=after))
            before = after
        return told

    def _with(self, adapter: Arrays) -> Any:
        return self.backend.restore(self.session, TrainingState(adapter=adapter, optimizer={}, step=0))


@attrs.frozen(kw_only=True, eq=False)
class OracleWitness:
    """The specification.

    Attributes:
        oracle: opened on the same folder.
    """

    oracle: Oracle
    name: str = "oracle"

    @classmethod
    def like(cls, witness: BackendWitness) -> OracleWitness:
        """The specification of what a backend has open.

        An NF4 base is quantised by the specification. The mean of the scales alone, whose last bits are open, is the
        backend's, so that every other byte is the same; it is compared by itself (``storage``).
        """
        plan, quant, backend = witness.plan, witness.plan.contract.quant, witness.backend
        spec = NF4Spec(block_size=quant.block_size, double_quant=quant.double_quant)

        def stored(weight: NDArray[np.float32]) -> NDArray[np.float32]:
            weight = np.ascontiguousarray(weight)
            offset = backend.quantize(weight, spec).offset if spec.double_quant else None
            return dequantize(quantize(weight, spec, offset=offset))

        qlora = plan.contract.adapter.method == "qlora"
        adapter = plan.contract.adapter
        paths = linear_shapes(plan.layout) if adapter.has_patterns else ()
        scales = {path: adapter.scale_of(path) for path in paths}
        stored_as = stored if qlora else None
        return cls(oracle=Oracle.open(Path(plan.model_dir), scale=adapter.scale, scales=scales, stored=stored_as))

    def logits(self, adapter: Arrays, batch: Batch) -> NDArray[Any]:
        """In float64."""
        return self.oracle.logits(adapter, batch)

    def loss(self, adapter: Arrays, batch: Batch) -> float:
        """In float64."""
        return float(self.oracle.loss(adapter, batch))


def obstacle_to_oracle(layout: Layout, parameters: int) -> str | None:
    """Why the specification cannot answer for a model, one sentence; None if it can."""
    if layout.family not in GRAPHS:
        return f"the specification has no model_type {layout.model_type!r}, only {', '.join(GRAPHS)}"
    if parameters > _MOST_PARAMETERS:
        most = f"{_MOST_PARAMETERS / 1e6:.0f} million"
        return f"{parameters:,} parameters are too many for the specification in float64, which takes up to {most}"
    key, default = ("activation_function", "gelu_new") if layout.family == "gpt2" else ("hidden_act", "silu")
    if layout.config.get(key, default) not in ACTIVATIONS:
        return f"the specification has no activation {layout.config[key]!r}"
    try:
        inverse_frequencies(layout)
    except ModelError as error:
        return error.what if layout.family != "gpt2" else None
    return None
