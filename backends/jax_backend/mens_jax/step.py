"""A session: forward, loss, backward and update over one accumulation window.

::

    window of batches ──▶ Σ token losses ──▶ backward ──▶ Σ gradients
                                                             │ · 1 / supervised tokens of the window
                                                             │ · min(1, max_grad_norm / norm)
                                                             ▼
              A, B, what is whole ◀── AdamW (Loshchilov & Hutter 2019, algorithm 2), unless something is not finite

The whole window is one compiled function, compiled once for each of at most three sizes (``_sizes``). Nothing
waits for the device: metrics and the decision to skip an update stay there.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence

import attrs
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array, lax
from numpy.typing import NDArray

from mens_core.errors import DataError, ModelError
from mens_core.exchange import Batch, BatchShape, StepMetrics, TrainingState
from mens_core.hf.whole import whole_shapes
from mens_core.plan import ExecutionPlan
from mens_jax._adamw import Numbers, Trained, adamw
from mens_jax._arrays import device_named, take
from mens_jax._names import stacked_name
from mens_jax._packing import PackedBatch, fill, stack
from mens_jax._sizes import Buckets, logits_chunk
from mens_jax._structure import Structure
from mens_jax._whole import Table
from mens_jax.dropout import Dropout, dropout_of
from mens_jax.loss import supervised_loss
from mens_jax.model import hidden_states, load_model, logits, set_dropout

__all__ = ["Session", "forward", "loss", "open_session", "restore", "state", "step"]

_MOMENTS = ("exp_avg", "exp_avg_sq")


@attrs.define(kw_only=True, eq=False)
class Session:
    """What ``mens_open`` hands out.

    Attributes:
        plan: what is being done.
        structure: of the model.
        frozen: the base's arrays.
        trained: adapter and optimizer.
        adapted: module paths that carry an adapter, layer by layer.
        whole: names of the tensors that are trained whole.
        buckets: the sizes that batches are filled up to.
        fresh_since: the step at which the moments were last zero; None once they were restored.
    """

    plan: ExecutionPlan
    structure: Structure
    frozen: nnx.State
    trained: Trained
    adapted: tuple[str, ...]
    whole: tuple[str, ...]
    buckets: Buckets
    fresh_since: int | None = 0


def open_session(plan: ExecutionPlan, shape: BatchShape) -> Session:
    """Load the model, attach an adapter that is the identity, make AdamW ready.

    Args:
        plan: what will be done.
        shape: the largest batch; it decides the sizes that are compiled.

    Raises:
        ModelError: if weights are missing, left over, wrongly shaped or not finite.
        ContractError: if a target names no linear layer.
    """
    device = device_named(plan.device)
    with jax.default_device(device):
        model = load_model(plan)
        graph, adapter, tables, frozen = nnx.split(model, nnx.LoRAParam, Table, ...)
        arrays, tree = jax.tree.flatten(adapter)
        numbers = Numbers(jax.device_put(np.concatenate([np.ravel(array) for array in arrays])), tables)
        first, second = (jax.tree.map(jnp.zeros_like, numbers) for _ in _MOMENTS)
        trained = Trained(numbers, first, second, jax.device_put(np.int32(0)))
    # Committed to their device, so that whatever meets them is computed there.
    frozen, trained = jax.device_put((frozen, trained), device)
    return Session(
        plan=plan,
        structure=Structure(graph, tree, tuple(array.shape for array in arrays)),
        frozen=frozen,
        trained=trained,
        adapted=model.adapted,
        whole=tuple(whole_shapes(plan.layout, plan.contract.adapter.modules_to_save)),
        buckets=Buckets(shape),
    )


def forward(session: Session, batch: Batch) -> NDArray[np.float32]:
    """Logits of every position, adapter included.

    Returns:
        (T, V) float32.
    """
    packed = fill(batch, session.buckets.fit([batch]))
    found = _logits(session.structure, session.frozen, session.trained.adapter, packed)
    return np.array(found[: len(batch.input_ids)])


def loss(session: Session, batch: Batch) -> tuple[float, int]:
    """Cross-entropy of the supervised positions, without a gradient.

    Returns:
        (sum over the supervised tokens, in nats; their number).
    """
    if not batch.supervised_tokens:
        return 0.0, 0
    packed = fill(batch, session.buckets.fit([batch]))
    total = _loss_sum(session.trained.adapter, session.structure, session.frozen, packed)
    return float(total), batch.supervised_tokens


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
    batches = [batch for batch in window if batch.supervised_tokens]
    size = session.buckets.fit(batches)
    packed = stack([fill(batch, size) for batch in batches], max(session.buckets.batches, len(batches)))
    spec = session.plan.contract.training
    session.trained, loss_sum, grad_norm = _step(
        session.structure,
        session.frozen,
        session.trained,
        packed,
        np.int32(len(batches)),
        np.asarray([supervised, learning_rate, spec.max_grad_norm, spec.weight_decay], np.float32),
        dropout_of(session.plan.contract),
    )
    return StepMetrics(loss_sum=loss_sum, grad_norm=grad_norm, supervised_tokens=supervised)


def state(session: Session) -> TrainingState:
    """Copy adapter and optimizer out; the copy does not change when training goes on."""
    trained = session.trained
    taken, optimizer = int(trained.updates), dict[str, NDArray[np.float32]]()
    if session.fresh_since is None or session.fresh_since != taken:
        for moment, numbers in zip(_MOMENTS, (trained.exp_avg, trained.exp_avg_sq), strict=True):
            optimizer |= {f"{name}.{moment}": array for name, array in _copied_out(session, numbers).items()}
    return TrainingState(adapter=_copied_out(session, trained.adapter), optimizer=optimizer, step=taken)


def restore(session: Session, state: TrainingState) -> Session:
    """Replace adapter and optimizer; an empty ``state.optimizer`` means fresh moments.

    Returns:
        The same session.

    Raises:
        ModelError: listing every name that is missing, unknown or of another shape; the session is then unchanged.
    """
    wanted = {name: part.shape for name, part in _parts(session, _on_host(session.trained.adapter)).items()}
    problems = _misfits(wanted, state.adapter)
    if state.optimizer:
        moments = {f"{name}.{moment}": shape for name, shape in wanted.items() for moment in _MOMENTS}
        problems += _misfits(moments, state.optimizer)
    if problems:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        listing = "\n".join(f"  - {problem}" for problem in problems)
        raise ModelError(f"a saved state does not fit this adapter, {count}:\n{listing}", where=f"step {state.step}")
    adapter = _put_in(session, state.adapter, "")
    exp_avg, exp_avg_sq = (_put_in(session, state.optimizer, f".{moment}") for moment in _MOMENTS)
    trained = (adapter, exp_avg, exp_avg_sq, np.int32(state.step))
    session.trained = Trained(*jax.device_put(trained, device_named(session.plan.device)))
    session.fresh_since = None if state.optimizer else state.step
    return session


@functools.partial(jax.jit, static_argnums=0)
def _logits(structure: Structure, frozen: nnx.State, adapter: Numbers, batch: PackedBatch) -> Array:
    model, everything = structure.model(frozen, adapter), jnp.arange(len(batch.input_ids))
    return logits(model, batch.input_ids, batch.positions, batch.rows, everything)


@functools.partial(jax.jit, static_argnums=1)
def _loss_sum(
    adapter: Numbers,
    structure: Structure,
    frozen: nnx.State,
    batch: PackedBatch,
    dropout: Dropout | None = None,
) -> Array:
    """Sum of the supervised tokens' cross-entropies, () float32; in training under dropout of this batch."""
    model = structure.model(frozen, adapter)
    set_dropout(model, dropout)
    hidden = hidden_states(model, batch.input_ids, batch.positions, batch.rows)
    chosen, head = take(hidden, batch.keep, batch.back), model.table_out
    chunk = logits_chunk(len(head.source))
    return supervised_loss(chosen, head.source, batch.targets, chunk, trained=head.trained)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _step(
    structure: Structure,
    frozen: nnx.State,
    trained: Trained,
    window: PackedBatch,
    batches: Array,
    numbers: Array,
    dropout: Dropout | None = None,
) -> tuple[Trained, Array, Array]:
    """The whole step on the device: (trained, loss sum, mean gradient's global norm).

    Args:
        structure: of the model, static.
        frozen: the base's arrays.
        trained: donated; its memory is the result's.
        window: batches one above the other.
        batches: how many of them count.
        numbers: supervised tokens, learning rate, max_grad_norm, weight_decay; arguments, so that none of them
            is compiled in.
        dropout: of the run; its numbers are arguments as well. None is another, the plain function.
    """
    supervised, learning_rate, max_grad_norm, weight_decay = numbers

    def add(index: Array, sums: tuple[Array, Numbers]) -> tuple[Array, Numbers]:
        batch = jax.tree.map(lambda part: part[index], window)
        own = None if dropout is None else dropout.fold(trained.updates, index)
        loss_sum, gradient = jax.value_and_grad(_loss_sum)(trained.adapter, structure, frozen, batch, own)
        return sums[0] + loss_sum, jax.tree.map(jnp.add, sums[1], gradient)

    zero = jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, trained.adapter)
    loss_sum, gradient = lax.fori_loop(0, batches, add, zero)
    norm = optax.tree.norm(gradient) / supervised
    factor = jnp.minimum(1.0, max_grad_norm / norm) / supervised
    gradient = jax.tree.map(lambda part: part * factor, gradient)
    updated = adamw(trained, gradient, learning_rate, weight_decay)
    sound = jnp.isfinite(loss_sum) & jnp.isfinite(norm)
    return jax.tree.map(lambda new, old: jnp.where(sound, new, old), updated, trained), loss_sum, norm


def _on_host(numbers: Numbers) -> Numbers:
    """The same numbers as NumPy's arrays, not to be written into."""
    found: Numbers = jax.tree.map(np.asarray, numbers)
    return found


def _parts(session: Session, numbers: Numbers) -> dict[str, NDArray[np.float32]]:
    """Shared name → view into the numbers, which are on the host, in the order of the model's layers."""
    states = (numbers.tables, session.structure.unravel(numbers.vector))
    leaves = itertools.chain.from_iterable(map(nnx.to_flat_state, states))
    stacks = {".".join(map(str, path)): leaf.get_value() for path, leaf in leaves}
    places = [(path, *stacked_name(path)) for path in session.adapted]
    views: dict[str, NDArray[np.float32]] = {}
    for path, stacked, layer in places:
        # A stack has its largest rank; what a layer has not is zero, and stays so.
        rank = session.plan.contract.adapter.rank_of(path)
        views[f"{path}.lora_A.weight"] = stacks[f"{stacked}.lora_a"][layer][:rank]
        views[f"{path}.lora_B.weight"] = stacks[f"{stacked}.lora_b"][layer][:, :rank]
    for name in session.whole:
        stacked, layer = stacked_name(name)
        # Of a stack, layers that are not trained have a master as well, which nobody reads.
        views[name] = stacks[f"{stacked}.master"] if layer is None else stacks[f"{stacked}.master"][layer]
    return views


def _copied_out(session: Session, numbers: Numbers) -> dict[str, NDArray[np.float32]]:
    return {name: part.copy() for name, part in _parts(session, _on_host(numbers)).items()}


def _put_in(session: Session, arrays: Mapping[str, NDArray[np.float32]], suffix: str) -> Numbers:
    """Numbers like the adapter's with the given arrays; zero where there are none."""
    numbers: Numbers = jax.tree.map(lambda part: np.zeros(part.shape, np.float32), session.trained.adapter)
    for name, part in _parts(session, numbers).items():
        if f"{name}{suffix}" in arrays:
            part[...] = arrays[f"{name}{suffix}"]
    return numbers


def _misfits(wanted: Mapping[str, tuple[int, ...]], given: Mapping[str, NDArray[np.float32]]) -> list[str]:
    problems = [f"{name} is missing" for name in wanted if name not in given]
    problems += [f"{name} is unknown" for name in given if name not in wanted]
    return problems + [
        f"{name} has shape {tuple(given[name].shape)}, expected {shape}"
        for name, shape in wanted.items()
        if name in given and tuple(given[name].shape) != shape
    ]
