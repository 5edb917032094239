"""What this backend offers for a run, answered without loading PyTorch wherever that is possible."""

from __future__ import annotations

from mens_core.contract import FineTuneContract
from mens_core.errors import ContractError
from mens_core.exchange import KernelOffer, Machine
from mens_core.hf.layout import Layout
from mens_core.hookspecs import hookimpl
from mens_torch.device import capacity, pick_device, pick_dtype

__all__ = ["mens_plan", "unsupported"]


@hookimpl
def mens_plan(contract: FineTuneContract, layout: Layout, machine: Machine) -> KernelOffer:
    """See ``mens_core.hookspecs.mens_plan``."""
    kernel = f"torch_{contract.adapter.method}"
    try:
        device = pick_device(contract.compute.device, machine)
    except ContractError as error:
        return KernelOffer(kernel=kernel, feasible=False, reason=str(error))
    reason = unsupported(layout)
    if reason is not None:
        return KernelOffer(kernel=kernel, feasible=False, reason=reason)
    return KernelOffer(
        kernel=kernel,
        feasible=True,
        device=device,
        dtype=pick_dtype(contract.compute.dtype, device),
        capacity_bytes=capacity(device, machine),
    )


def unsupported(layout: Layout) -> str | None:
    """Say why this backend cannot build the model, in one sentence; None if it can. Reads no weight."""
    if layout.config.get("quantization_config"):
        return "the base is stored quantised already; give the checkpoint it was made from"
    if layout.family is not None:
        return None
    # heavy: only a model type that the core does not know has to be looked up
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES  # noqa: PLC0415

    if layout.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return None
    return (
        f"transformers knows no causal language model of model_type {layout.model_type!r}; "
        "a newer transformers may know it"
    )
