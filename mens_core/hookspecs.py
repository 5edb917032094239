"""The hooks in order of time: the contract between the core and a backend.

A backend is a module (or object) whose functions carry ``@hookimpl`` and bear the names below. One backend is
loaded per run. An implementation may take fewer arguments than its specification, never others. The core calls
through typed wrappers (``mens_core.plugins``), which turn a missing, wrongly typed, wrongly shaped or non-finite
answer into a ``HookContractError`` naming the plugin. Records are defined in ``mens_core.plan`` and
``mens_core.exchange``.

Set ``MENS_TRACE_HOOKS=1`` to see every call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from mens_core.contract import FineTuneContract
    from mens_core.exchange import (
        Batch,
        BatchShape,
        GenerateSettings,
        NF4Spec,
        QuantizedWeight,
        StepMetrics,
        TrainingState,
    )
    from mens_core.hf.layout import Layout
    from mens_core.plan import BaseWeights, ExecutionPlan, GateVerdict, KernelOffer, Machine, Workload

__all__ = ["hookimpl", "hookspec"]

hookspec = pluggy.HookspecMarker("mens_core")
hookimpl = pluggy.HookimplMarker("mens_core")


# --- before anything is spent -------------------------------------------------------------------------------


@hookspec(firstresult=True)
def mens_plan(
    contract: FineTuneContract, layout: Layout, machine: Machine, weights: BaseWeights, workload: Workload | None
) -> KernelOffer | None:
    """Say whether this backend can do the run, on which device, in which number format, and what it will cost.

    Called once per plan, before any weight is read. Must not read weights, write files or allocate on a device.
    A backend may keep it in a module of its own, an entry point of the same name in the group ``mens_core.offers``;
    planning then loads that module and not the backend, so that a plan need not wait for a framework.

    Args:
        contract: what is asked for; ``contract.adapter.method`` decides the kernel.
        layout: the base model's numbers; ``layout.family`` is None for a model type the core does not know.
        machine: what the core knows of this machine.
        weights: what the headers of the base's files say.
        workload: how much there is to train on; None where nothing is trained.

    Returns:
        An offer. "No" is an offer with ``feasible=False`` and a reason, never an exception.

    Invariants: the same arguments give the same offer; ``kernel`` is ``<backend>_<method>``.
    """


@hookspec
def mens_gates(contract: FineTuneContract, plan: ExecutionPlan) -> Sequence[GateVerdict] | None:
    """Add checks of a third party to the plan. Any plugin may implement it; all answers count.

    A backend that answers ``mens_plan`` in a module of its own keeps its gates there too.

    Called once per plan, after the core's own gates passed and a kernel was chosen.

    Args:
        contract: what is asked for.
        plan: the plan so far.

    Returns:
        Verdicts; one that did not pass refuses the run with its message. None or an empty sequence adds nothing.
    """


# --- weights ------------------------------------------------------------------------------------------------


@hookspec(firstresult=True)
def mens_quantize(weight: NDArray[np.float32], spec: NF4Spec) -> QuantizedWeight | None:
    """Store a weight in NF4.

    Called by loading, parity and merging; needs no session.

    Args:
        weight: (out, in) float32, finite.
        spec: block size and whether the scales are quantised too.

    Returns:
        Codes and scales, byte for byte those of ``bitsandbytes.functional.quantize_4bit``.

    Raises:
        ModelError: if a value is not finite.
    """


@hookspec(firstresult=True)
def mens_dequantize(quantized: QuantizedWeight) -> NDArray[np.float32] | None:
    """Bring an NF4 weight back: codebook value times the block's absmax.

    Called by parity and merging; needs no session. The values are those of
    ``bitsandbytes.functional.dequantize_4bit`` in float32.

    Returns:
        (out, in) float32.
    """


# --- a session ----------------------------------------------------------------------------------------------


@hookspec(firstresult=True)
def mens_open(plan: ExecutionPlan, shape: BatchShape) -> Any:
    """Load the base, attach an adapter, make the optimizer ready.

    Called once per run (and once per generation). The adapter must be the identity: the core then sets its
    start through ``mens_restore``, so that every backend begins from the same numbers. A layer has the rank and the
    scale that ``contract.adapter.rank_of`` and ``scale_of`` give for its path.

    The tensors of ``plan.whole`` take the places of the base's, and are quantised in no case. Where the layout ties
    the head to the embedding, either may be named, and leaves the other as it was.

    The tensors of the modules that ``contract.adapter.modules_to_save`` names (``mens_core.hf.whole.whole_shapes``) are
    trained with the adapter. Their masters are float32 and start as what the session holds of the base; the modules
    compute with them rounded to the base's format. A head or an embedding that was tied gets a master of its own and
    leaves the other as it was.

    Args:
        plan: what will be done; ``plan.model_dir`` holds config.json and safetensors files.
        shape: the largest batch of the run.

    Returns:
        The backend's own object; the core only hands it back.

    Raises:
        ModelError: if weights are missing, left over, wrongly shaped or not finite.

    Invariants: the base never changes afterwards; nothing is written to disk.
    """


@hookspec(firstresult=True)
def mens_forward(session: Any, batch: Batch) -> NDArray[np.float32] | None:
    """Logits of every position, adapter included.

    Called by parity and evaluation. Row k of a batch gives the same logits as when it is alone in its batch.

    Returns:
        (T, V) float32.
    """


@hookspec(firstresult=True)
def mens_loss(session: Any, batch: Batch) -> tuple[float, int] | None:
    """Cross-entropy of the supervised positions, without a gradient.

    Called by evaluation.

    Returns:
        (sum over the supervised tokens, in nats; their number). (0.0, 0) if none is supervised.
    """


@hookspec(firstresult=True)
def mens_step(session: Any, window: Sequence[Batch], learning_rate: float) -> StepMetrics | None:
    """Forward, loss and backward over one accumulation window, then one AdamW update.

    Called by the loop. The gradient is that of (sum of token losses of the window) / (supervised tokens of the
    window), so the way a window is cut into batches does not matter. It is scaled down to the contract's
    ``max_grad_norm`` if its global norm exceeds it. AdamW: betas 0.9 and 0.999, epsilon 1e-8, bias-corrected,
    weight decay decoupled (Loshchilov & Hutter 2019, algorithm 2). If loss or norm is not finite the adapter
    and the optimizer stay as they were.

    The adapter here is all that the session's state has as such: A and B, and the masters of modules that are trained
    whole. The row of an embedding that ``mens_core.hf.whole.untrained_row`` names gets no gradient.

    With ``dropout`` p in the contract, each entry of the input of every A is zeroed with probability p and the others
    are divided by 1 - p, in the backward pass the same ones (Hu et al. 2021; Srivastava et al. 2014); no other hook
    drops anything. A mask is a function of the contract's seed, the optimizer steps taken, the batch's place in the
    window, the module's path and the shape: nothing is drawn from a generator that anybody else reads or advances,
    and a restored session goes on bit for bit. A window that is cut otherwise sees other masks, so that its cut does
    matter unless p is 0.

    Args:
        session: from ``mens_open``.
        window: at least one batch; at least one supervised token in all.
        learning_rate: of this step; the schedule belongs to the core.

    Returns:
        Metrics that may still live on the device.
    """


@hookspec(firstresult=True)
def mens_state(session: Any) -> TrainingState | None:
    """Copy adapter and optimizer out, under the names all backends share.

    Called after opening, for checkpoints and at the end. The copy does not change when training goes on.
    """


@hookspec(firstresult=True)
def mens_restore(session: Any, state: TrainingState) -> Any:
    """Replace adapter and optimizer.

    Called after opening and on resume. An empty ``state.optimizer`` means fresh moments.

    Returns:
        The session: the same object or a new one.

    Raises:
        ModelError: if a name is missing, unknown or of another shape; the session is then unchanged.

    Invariants: ``mens_state(mens_restore(s, x))`` equals x bit for bit.
    """


# --- use ----------------------------------------------------------------------------------------------------


@hookspec(firstresult=True)
def mens_generate(
    session: Any, prompt: Sequence[int], settings: GenerateSettings, on_token: Callable[[int], None] | None
) -> list[int] | None:
    """Continue a prompt greedily.

    Called by generation.

    Args:
        session: from ``mens_open``.
        prompt: at least one token id.
        settings: length and stop tokens.
        on_token: to be called with each new token as soon as it is known, in order; None if nobody listens. A backend
            that does not take it is listened to when it has finished.

    Returns:
        The new tokens only; a stop token ends them and is included.
    """


@hookspec(firstresult=True)
def mens_merge(
    weight: NDArray[np.float32], lora_a: NDArray[np.float32], lora_b: NDArray[np.float32], scale: float
) -> NDArray[np.float32] | None:
    """W + scale · B A, computed in float32 (Hu et al. 2021, section 4.1).

    Called by merging; needs no session.

    Args:
        weight: (out, in).
        lora_a: (R, in).
        lora_b: (out, R).
        scale: alpha / rank, dimensionless.

    Returns:
        (out, in) float32, newly allocated; the arguments are not changed.

    Raises:
        ModelError: if the shapes do not fit; nothing is broadcast.
    """


# --- at any time --------------------------------------------------------------------------------------------


@hookspec
def mens_event(event: Mapping[str, Any]) -> None:
    """Observe a run. Any plugin may implement it.

    Called with each event right after it was written to telemetry.jsonl: ``ts_ms``, ``event``, ``payload``.
    Must not change the event. An exception ends the run: nothing fails in silence.
    """
