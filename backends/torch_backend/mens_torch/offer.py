"""What this backend offers for a run, answered without loading PyTorch wherever that is possible."""

from __future__ import annotations

import attrs

from mens_core.contract import FineTuneContract
from mens_core.costs import COSTS, step_costs, step_seconds
from mens_core.errors import ContractError
from mens_core.hf.layout import Layout
from mens_core.hookspecs import hookimpl
from mens_core.plan import BaseWeights, KernelOffer, Machine, Speed, Workload
from mens_torch._processor import multiplies_bfloat16
from mens_torch.device import capacity, pick_device, pick_dtype
from mens_torch.memory import memory_parts

__all__ = ["mens_plan", "unsupported"]

# Seconds per unit of each of ``costs.COSTS``. cpu: one core of a server of 2024 (AVX-512, bfloat16 products), as
# ``measuring`` found them, divided by the cores below. cuda: nobody measured; about half of what the data sheet of an
# accelerator of 2023 promises, and a millisecond for the launches of a layer.
_TYPICAL = {
    # products, adapter, attention, elementwise, logits, weights, layers, updates
    "torch_lora cpu bfloat16": (4.9e-12, 9e-12, 6e-12, 1.6e-09, 2.5e-09, 6e-10, 0.001, 5e-09),
    "torch_lora cpu float32": (9.8e-12, 9e-12, 8e-12, 1.8e-09, 2.5e-09, 6e-10, 0.001, 5e-09),
    "torch_qlora cpu bfloat16": (4.9e-12, 9e-12, 6e-12, 1.6e-09, 2.5e-09, 8e-10, 0.0014, 5e-09),
    "torch_qlora cpu float32": (9.8e-12, 9e-12, 8e-12, 1.8e-09, 2.5e-09, 8e-10, 0.0014, 5e-09),
    "torch_lora cuda bfloat16": (4e-15, 1e-14, 8e-15, 2e-12, 2e-11, 2e-12, 0.001, 2e-11),
    "torch_lora cuda float32": (4e-14, 6e-14, 6e-14, 4e-12, 2e-11, 4e-12, 0.001, 2e-11),
    "torch_qlora cuda bfloat16": (4e-15, 1e-14, 8e-15, 2e-12, 2e-11, 4e-12, 0.001, 2e-11),
    "torch_qlora cuda float32": (4e-14, 6e-14, 6e-14, 4e-12, 2e-11, 8e-12, 0.001, 2e-11),
}
_SOURCES = {
    True: "a table of one core of another CPU; measure with: python -m mens_core doctor --measure",
    False: "a table from data sheets, not measured; measure with: python -m mens_core doctor --measure",
}


@hookimpl
def mens_plan(
    contract: FineTuneContract, layout: Layout, machine: Machine, weights: BaseWeights, workload: Workload | None
) -> KernelOffer:
    """See ``mens_core.hookspecs.mens_plan``."""
    kernel = f"torch_{contract.adapter.method}"
    try:
        device = pick_device(contract.compute.device, machine)
    except ContractError as error:
        return KernelOffer(kernel=kernel, feasible=False, reason=str(error))
    reason = unsupported(layout) or _never_again(contract, layout)
    if reason is not None:
        return KernelOffer(kernel=kernel, feasible=False, reason=reason)
    dtype = pick_dtype(contract.compute.dtype, device)
    offer = KernelOffer(
        kernel=kernel,
        feasible=True,
        device=device,
        dtype=dtype,
        capacity_bytes=capacity(device, machine),
        patterns=True,
        whole=True,
        modules_to_save=True,
    )
    if workload is None:
        return offer
    speed = machine.speeds.get(f"{kernel} {device} {dtype}") or _typical(kernel, device, dtype, machine)
    costs = step_costs(layout, weights, contract, workload)
    return attrs.evolve(
        offer,
        memory=memory_parts(contract, layout, weights, workload, device, dtype),
        seconds_per_step=step_seconds(costs, speed),
        seconds_source=speed.source,
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


def _never_again(contract: FineTuneContract, layout: Layout) -> str | None:
    """Why layers cannot be computed again, where that is asked for; every model type that the core knows can be."""
    if layout.family is not None or not contract.training.gradient_checkpointing:
        return None
    # heavy: only a model type that the core does not know has to be looked up
    import transformers  # noqa: PLC0415
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES  # noqa: PLC0415

    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[layout.model_type]
    if getattr(transformers, name).supports_gradient_checkpointing:
        return None
    return f"transformers cannot compute layers of its {name} again, as gradient_checkpointing asks for; leave it false"


def _typical(kernel: str, device: str, dtype: str, machine: Machine) -> Speed:
    """A speed for a machine on which nobody measured; its source says so."""
    on_cpu = device == "cpu"
    if on_cpu and not multiplies_bfloat16():
        # It is computed in float32 (_widened).
        dtype = "float32"
    seconds = _TYPICAL[f"{kernel} {device.partition(':')[0]} {dtype}"]
    cores = machine.cpu_count if on_cpu else 1
    return Speed(
        seconds={name: value / cores for name, value in zip(COSTS, seconds, strict=True)}, source=_SOURCES[on_cpu]
    )
