"""What happens between opening and closing: loss, gradient, AdamW, state.

::

    window of batches ──▶ Σ token losses ──▶ backward ──▶ Σ gradients
                                                             │ · 1 / supervised tokens of the window
                                                             │ · min(1, max_grad_norm / norm)
                                                             ▼
                            A, B ◀── AdamW (Loshchilov & Hutter 2019, algorithm 2), unless something is not finite
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence

import attrs
import numpy as np

from mens_core import Batch, ExecutionPlan, StepMetrics, TrainingState
from mens_core.errors import ContractError, DataError, ModelError
from mens_core.exchange import IGNORE
from mens_core.hf.keymap import linear_shapes
from mens_numpy.decoder import Decoder
from mens_numpy.layers import Linear, Parameter
from mens_numpy.weights import Array, read_base

__all__ = ["Session", "open_session"]

_BETAS, _EPSILON = (0.9, 0.999), 1e-8
_MOMENTS = ("exp_avg", "exp_avg_sq")


@attrs.define(kw_only=True, eq=False)
class Session:
    """A base with an adapter and its optimizer.

    Attributes:
        plan: what is being done.
        decoder: the graph.
        parameters: shared name → A or B.
        moments: name in ``TrainingState.optimizer`` → moment; empty before the first step.
        taken: optimizer steps taken.
    """

    plan: ExecutionPlan
    decoder: Decoder
    parameters: Mapping[str, Parameter]
    moments: dict[str, Array] = attrs.field(factory=dict)
    taken: int = 0

    def logits(self, batch: Batch) -> Array:
        """(T, V) float32."""
        return self.decoder.hidden(batch)[0] @ self.decoder.head.T

    def loss(self, batch: Batch) -> tuple[float, Callable[[], None]]:
        """Sum of the supervised positions' cross-entropies, and what adds its gradient to the parameters'."""
        hidden, pull = self.decoder.hidden(batch)
        chosen = np.flatnonzero(batch.targets != IGNORE)
        places, targets = np.arange(len(chosen)), batch.targets[chosen]
        logits = hidden[chosen] @ self.decoder.head.T
        logits -= logits.max(axis=-1, keepdims=True)
        shares = np.exp(logits)
        totals = shares.sum(axis=-1, keepdims=True)
        losses = np.log(totals[:, 0]) - logits[places, targets]

        def backward() -> None:
            slopes = shares / totals
            slopes[places, targets] -= 1
            gradient = np.zeros_like(hidden)
            gradient[chosen] = slopes @ self.decoder.head
            pull(gradient)

        return float(losses.sum(dtype=np.float64)), backward

    def step(self, window: Sequence[Batch], learning_rate: float) -> StepMetrics:
        """One update; where loss or norm is not finite, none.

        Raises:
            DataError: if no token of the window is supervised.
        """
        supervised = sum(batch.supervised_tokens for batch in window)
        if not supervised:
            raise DataError("a window has no supervised token", expected="at least one target that is not ignored")
        for parameter in self.parameters.values():
            parameter.gradient[...] = 0
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is seen in loss and norm
            spoken = [batch for batch in window if batch.supervised_tokens]
            total = sum(self._backward(place, batch) for place, batch in enumerate(spoken))
            norm = self._norm() / supervised
        if np.isfinite([total, norm]).all():
            clip = min(1.0, self.plan.contract.training.max_grad_norm / norm) if norm else 1.0
            self._update(clip / supervised, learning_rate)
        return StepMetrics(loss_sum=total, grad_norm=norm, supervised_tokens=supervised)

    def state(self) -> TrainingState:
        """Copies."""
        return TrainingState(
            adapter={name: parameter.value.copy() for name, parameter in self.parameters.items()},
            optimizer={name: moment.copy() for name, moment in self.moments.items()},
            step=self.taken,
        )

    def restore(self, state: TrainingState) -> None:
        """Take a state over, by copy.

        Raises:
            ModelError: naming all that does not fit; nothing has changed then.
        """
        shapes = {name: parameter.value.shape for name, parameter in self.parameters.items()}
        moments = {f"{name}.{moment}": shape for name, shape in shapes.items() for moment in _MOMENTS}
        problems = _misfits(shapes, state.adapter) + (_misfits(moments, state.optimizer) if state.optimizer else [])
        if problems:
            listing = "\n".join(f"  - {problem}" for problem in problems)
            raise ModelError(f"a saved state does not fit this adapter:\n{listing}", where=f"step {state.step}")
        for name, parameter in self.parameters.items():
            parameter.value[...] = state.adapter[name]
        self.moments = {name: np.array(moment) for name, moment in state.optimizer.items()}
        self.taken = state.step

    def _backward(self, place: int, batch: Batch) -> float:
        """Add one batch's gradient; under dropout, that of the modules' own masks for this place in the window."""
        spec = self.plan.contract
        for path, linear in self.decoder.linears.items():
            if spec.adapter.dropout:
                key = f"{spec.training.seed}:{self.taken}:{place}:{path}"
                linear.kept = _mask(key, spec.adapter.dropout)
        try:
            total, backward = self.loss(batch)
        finally:
            for linear in self.decoder.linears.values():
                linear.kept = None
        backward()
        return total

    def _norm(self) -> float:
        squares = (np.square(parameter.gradient, dtype=np.float64).sum() for parameter in self.parameters.values())
        return float(np.sqrt(sum(squares)))

    def _update(self, factor: float, learning_rate: float) -> None:
        """AdamW on the summed gradients times a factor."""
        self.taken += 1
        decay = 1 - learning_rate * self.plan.contract.training.weight_decay
        corrections = [1 - beta**self.taken for beta in _BETAS]
        for name, parameter in self.parameters.items():
            gradient = parameter.gradient * np.float32(factor)
            first, second = (
                self.moments.setdefault(f"{name}.{moment}", np.zeros_like(parameter.value)) for moment in _MOMENTS
            )
            first += (1 - _BETAS[0]) * (gradient - first)
            second += (1 - _BETAS[1]) * (gradient * gradient - second)
            step = (first / corrections[0]) / (np.sqrt(second / corrections[1]) + _EPSILON)
            parameter.value *= np.float32(decay)
            parameter.value -= learning_rate * step


def open_session(plan: ExecutionPlan) -> Session:
    """Read the base and attach an adapter that is the identity, A and B zero.

    Raises:
        ModelError: as ``read_base`` does.
        ContractError: if a target names no linear layer.
    """
    spec, shapes = plan.contract.adapter, linear_shapes(plan.layout)
    chosen, base = _select(list(shapes), spec.targets), read_base(plan)
    linears, parameters = {}, {}
    for path, (out, into) in shapes.items():
        linear = linears[path] = Linear(base[f"{path}.weight"], base.get(f"{path}.bias"))
        if path in chosen:
            rank = spec.rank_of(path)
            linear.lora_a, linear.lora_b = _parameter(rank, into), _parameter(out, rank)
            linear.scale = spec.scale_of(path)
            parameters[f"{path}.lora_A.weight"], parameters[f"{path}.lora_B.weight"] = linear.lora_a, linear.lora_b
    return Session(plan=plan, decoder=Decoder(plan.layout, base, linears), parameters=parameters)


def _select(paths: Sequence[str], targets: tuple[str, ...]) -> set[str]:
    """The linear layers that the contract's targets name; a name is a path or the end of one."""
    if targets == ("all-linear",):
        return set(paths)
    found = {target: [path for path in paths if f".{path}".endswith(f".{target}")] for target in targets}
    for target, matching in found.items():
        if not matching:
            raise ContractError(f"no linear layer is called {target!r}", expected="all-linear, or the end of a path")
    return {path for matching in found.values() for path in matching}


def _parameter(*shape: int) -> Parameter:
    return Parameter(np.zeros(shape, np.float32), np.zeros(shape, np.float32))


def _mask(key: str, probability: float) -> Callable[[tuple[int, ...]], Array]:
    """Draws 0, with the probability, or 1 / (1 - probability); the same ones for the same key and shape."""
    seed = np.frombuffer(hashlib.sha256(key.encode()).digest()[:16], np.uint64)

    def kept(shape: tuple[int, ...]) -> Array:
        drawn = np.random.Generator(np.random.Philox(key=seed)).random(shape, np.float32)
        return (drawn >= probability).astype(np.float32) / np.float32(1 - probability)

    return kept


def _misfits(wanted: Mapping[str, tuple[int, ...]], given: Mapping[str, Array]) -> list[str]:
    problems = [f"{name} is missing" for name in wanted if name not in given]
    problems += [f"{name} is unknown" for name in given if name not in wanted]
    return problems + [
        f"{name} has shape {given[name].shape}, expected {shape}"
        for name, shape in wanted.items()
        if name in given and given[name].shape != shape
    ]
