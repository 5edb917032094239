"""A session: forward, loss, backward and update over one accumulation window.

::

    window of batches ──▶ Σ token losses ──▶ backward ──▶ Σ gradients
                                                             │ · 1 / supervised tokens of the window
                                                             │ · min(1, max_grad_norm / norm)
                                                             ▼
              A, B, what is whole ◀── AdamW (Loshchilov & Hutter 2019, algorithm 2), unless something is not finite

Nothing waits for the device, but that dropout reads how many steps were taken: metrics and the decision to skip an
update stay there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor as Array
from torch import nn
from torch.nn import functional

from mens_core.errors import ContractError, DataError, ModelError
from mens_core.exchange import IGNORE, Batch, BatchShape, StepMetrics, TrainingState
from mens_core.hf.fit import HEAD
from mens_core.plan import ExecutionPlan
from mens_torch._activations import compile_for
from mens_torch.dropout import Dropout, dropout_of
from mens_torch.loss import supervised_loss
from mens_torch.model import Model, hidden_states, load_model, logits, set_dropout

__all__ = ["Session", "forward", "loss", "open_session", "restore", "state", "step"]

_MOMENTS = ("exp_avg", "exp_avg_sq")


@attrs.define(kw_only=True, eq=False)
class Session:
    """What ``mens_open`` hands out.

    Attributes:
        plan: what is being done.
        model: the base with its adapter.
        parameters: shared name → float32 master, of A, of B or of what is trained whole, a view into ``trained``.
        trained: all parameters end to end, (P,) float32, as ``trained.grad`` holds all gradients.
        optimizer: AdamW over ``trained``, its moments and counter always in place.
        fresh_since: the step at which the moments were last zero; None once they were restored.
    """

    plan: ExecutionPlan
    model: Model
    parameters: dict[str, Array]
    trained: nn.Parameter
    optimizer: torch.optim.AdamW
    fresh_since: int | None = 0

    @property
    def packed(self) -> bool:
        """Whether rows run packed; else one at a time, as this model needs it."""
        return self.model.packed

    @property
    def linear_head(self) -> bool:
        """Whether logits are hidden · headᵀ; else the model computes them itself."""
        return self.model.linear_head


def open_session(plan: ExecutionPlan, shape: BatchShape) -> Session:
    """Load the model, attach an adapter that is the identity, make AdamW ready.

    Args:
        plan: what will be done.
        shape: the largest batch; PyTorch takes any shape, but a large one is worth compiling for.

    Raises:
        ModelError: if weights are missing, left over, wrongly shaped or not finite.
        ContractError: if a target names no linear layer, or this process lowered float32 precision.
    """
    if plan.dtype == "float32" and torch.get_float32_matmul_precision() != "highest":
        raise ContractError(
            "this process lets PyTorch multiply float32 matrices in a lower precision",
            where=f"torch.get_float32_matmul_precision() = {torch.get_float32_matmul_precision()!r}",
            fix='torch.set_float32_matmul_precision("highest"), or --dtype bfloat16',
        )
    model = load_model(plan)
    if shape.supervised > 1:
        # A prompt, which is read once, would not repay it.
        widest = torch.zeros(1, dtype=getattr(torch, plan.dtype), device=plan.device)
        compile_for(model.network, widest.expand(shape.tokens, plan.layout.intermediate_size))
    parameters: dict[str, Array] = {}
    for path, layer in model.adapters.items():
        parameters[f"{path}.lora_A.weight"], parameters[f"{path}.lora_B.weight"] = layer.lora_a, layer.lora_b
    parameters |= model.whole
    trained = _joined(parameters)
    optimizer = torch.optim.AdamW(
        [trained],
        lr=plan.contract.training.learning_rate,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=plan.contract.training.weight_decay,
        fused=True,
    )
    optimizer.state[trained] = {
        "step": torch.zeros((), dtype=torch.float32, device=trained.device),
        **{moment: torch.zeros_like(trained) for moment in _MOMENTS},
    }
    return Session(plan=plan, model=model, parameters=parameters, trained=trained, optimizer=optimizer)


def forward(session: Session, batch: Batch) -> NDArray[np.float32]:
    """Logits of every position, adapter included.

    Returns:
        (T, V) float32.
    """
    input_ids, positions, rows = _on_device(session, batch)
    with torch.no_grad():
        keep = torch.arange(len(input_ids), device=input_ids.device)
        found: NDArray[np.float32] = logits(session.model, input_ids, positions, rows, keep).float().cpu().numpy()
    return found


def loss(session: Session, batch: Batch) -> tuple[float, int]:
    """Cross-entropy of the supervised positions, without a gradient.

    Returns:
        (sum over the supervised tokens, in nats; their number).
    """
    if not batch.supervised_tokens:
        return 0.0, 0
    with torch.no_grad():
        return float(_loss_sum(session, batch)), batch.supervised_tokens


def step(session: Session, window: Sequence[Batch], learning_rate: float) -> StepMetrics:
    """Forward, loss and backward over one accumulation window, then one AdamW update.

    Args:
        session: from ``open_session``; its adapter and optimizer change.
        window: batches with at least one supervised token in all.
        learning_rate: of this step.

    Returns:
        Metrics that live on the device.

    Raises:
        DataError: if no token of the window is supervised.
    """
    supervised = sum(batch.supervised_tokens for batch in window)
    if not supervised:
        raise DataError("a window has no supervised token", expected="at least one target that is not ignored")
    loss_sum = torch.zeros((), dtype=torch.float32, device=session.model.device)
    dropout = dropout_of(session.plan.contract)
    if dropout is not None:
        dropout = dropout.fold(_taken(session))
    for index, batch in enumerate(batch for batch in window if batch.supervised_tokens):
        part = _dropped_loss_sum(session, batch, None if dropout is None else dropout.fold(index))
        part.backward()  # type: ignore[no-untyped-call]
        loss_sum += part.detach()
    grad_norm = _update(session, loss_sum, supervised, learning_rate)
    return StepMetrics(loss_sum=loss_sum, grad_norm=grad_norm, supervised_tokens=supervised)


def state(session: Session) -> TrainingState:
    """Copy adapter and optimizer out; the copy does not change when training goes on."""
    taken, optimizer = _taken(session), dict[str, NDArray[np.float32]]()
    if session.fresh_since is None or session.fresh_since != taken:
        for moment, parts in _moments(session).items():
            optimizer |= {f"{name}.{moment}": _copied_out(part) for name, part in parts.items()}
    adapter = {name: _copied_out(parameter) for name, parameter in session.parameters.items()}
    return TrainingState(adapter=adapter, optimizer=optimizer, step=taken)


def restore(session: Session, state: TrainingState) -> Session:
    """Replace adapter and optimizer; an empty ``state.optimizer`` means fresh moments.

    Returns:
        The same session.

    Raises:
        ModelError: listing every name that is missing, unknown or of another shape; the session is then unchanged.
    """
    wanted = {name: tuple(parameter.shape) for name, parameter in session.parameters.items()}
    problems = _misfits(wanted, state.adapter)
    if state.optimizer:
        moments = {f"{name}.{moment}": shape for name, shape in wanted.items() for moment in _MOMENTS}
        problems += _misfits(moments, state.optimizer)
    if problems:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        listing = "\n".join(f"  - {problem}" for problem in problems)
        raise ModelError(f"a saved state does not fit this adapter, {count}:\n{listing}", where=f"step {state.step}")
    with torch.no_grad():
        for name, parameter in session.parameters.items():
            parameter.copy_(torch.tensor(state.adapter[name]))
        for moment, parts in _moments(session).items():
            for name, part in parts.items():
                if state.optimizer:
                    part.copy_(torch.tensor(state.optimizer[f"{name}.{moment}"]))
                else:
                    part.zero_()
        session.optimizer.state[session.trained]["step"].fill_(state.step)
    session.fresh_since = None if state.optimizer else state.step
    return session


def _on_device(session: Session, batch: Batch) -> tuple[Array, Array, tuple[int, ...]]:
    device = session.model.device
    return _sent(batch.input_ids, device), _sent(batch.positions, device), tuple(batch.row_lengths.tolist())


def _sent(values: NDArray[Any], device: str) -> Array:
    """Token ids or positions on their way to the device; nobody waits for their arrival."""
    return torch.tensor(values, dtype=torch.int64).to(device, non_blocking=True)


def _loss_sum(session: Session, batch: Batch) -> Array:
    """Sum of the supervised tokens' cross-entropies, () float32."""
    model = session.model
    input_ids, positions, rows = _on_device(session, batch)
    chosen = np.flatnonzero(batch.targets != IGNORE)
    keep, targets = _sent(chosen, model.device), _sent(batch.targets[chosen], model.device)
    if model.linear_head and model.head is not None:
        hidden = hidden_states(model, input_ids, positions, rows).index_select(0, keep)
        return supervised_loss(hidden, model.head, targets, trained=HEAD in model.whole)
    found = logits(model, input_ids, positions, rows, keep)
    return functional.cross_entropy(found.float(), targets, reduction="sum")


def _dropped_loss_sum(session: Session, batch: Batch, dropout: Dropout | None) -> Array:
    """The same under dropout of this batch; the backward pass knows its masks by itself."""
    if dropout is None:
        return _loss_sum(session, batch)
    set_dropout(session.model, dropout)
    try:
        return _loss_sum(session, batch)
    finally:
        set_dropout(session.model, None)


def _taken(session: Session) -> int:
    """Optimizer steps taken; where they are counted on a device, this waits for it."""
    return int(session.optimizer.state[session.trained]["step"])


def _update(session: Session, loss_sum: Array, supervised: int, learning_rate: float) -> Array:
    """One AdamW update from the summed gradients; returns the mean gradient's global norm, () float32."""
    optimizer: Any = session.optimizer
    gradient: Any = session.trained.grad
    norm: Array = torch.linalg.vector_norm(gradient) / supervised
    clip = (session.plan.contract.training.max_grad_norm / norm).clamp(max=1.0)
    # The fused kernel divides by the one and does nothing at all where the other is 1; both stay on the device.
    optimizer.grad_scale = supervised / clip
    optimizer.found_inf = (~(torch.isfinite(loss_sum) & torch.isfinite(norm))).float()
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    gradient.zero_()
    return norm


def _joined(parameters: Mapping[str, Array]) -> nn.Parameter:
    """All parameters in one vector and all gradients in another, of which they become views.

    An update is then a few operations however many layers there are, and a layer that a batch does not reach has
    gradient zero, not none: every backend counts alike.
    """
    vector = nn.Parameter(torch.cat([parameter.detach().flatten() for parameter in parameters.values()]))
    vector.grad = torch.zeros_like(vector)
    values, slopes = _parts(parameters, vector.detach()), _parts(parameters, vector.grad)
    for name, parameter in parameters.items():
        parameter.data, parameter.grad = values[name], slopes[name]
    return vector


def _parts(parameters: Mapping[str, Array], vector: Array) -> dict[str, Array]:
    """Shared name → view into the vector."""
    sizes = [parameter.numel() for parameter in parameters.values()]
    parts = zip(parameters.items(), torch.split(vector, sizes), strict=True)
    return {name: part.view(parameter.shape) for (name, parameter), part in parts}


def _moments(session: Session) -> dict[str, dict[str, Array]]:
    """Moment → shared name → view into it."""
    found = session.optimizer.state[session.trained]
    return {moment: _parts(session.parameters, found[moment]) for moment in _MOMENTS}


def _misfits(wanted: Mapping[str, tuple[int, ...]], given: Mapping[str, NDArray[np.float32]]) -> list[str]:
    problems = [f"{name} is missing" for name in wanted if name not in given]
    problems += [f"{name} is unknown" for name in given if name not in wanted]
    return problems + [
        f"{name} has shape {tuple(given[name].shape)}, expected {shape}"
        for name, shape in wanted.items()
        if name in given and tuple(given[name].shape) != shape
    ]


def _copied_out(tensor: Array) -> NDArray[np.float32]:
    return np.array(tensor.detach().cpu().numpy(), dtype=np.float32, copy=True)
