"""What this backend offers for a run, answered without loading JAX wherever that is possible."""

from __future__ import annotations

import attrs

from mens_core.contract import FineTuneContract
from mens_core.costs import COSTS, step_costs, step_seconds
from mens_core.errors import ContractError
from mens_core.hf.layout import Layout
from mens_core.hookspecs import hookimpl
from mens_core.plan import BaseWeights, KernelOffer, Machine, Speed, Workload
from mens_jax._families import obstacle
from mens_jax._sizes import Buckets
from mens_jax.device import capacity, pick_device, pick_dtype
from mens_jax.memory import memory_parts

__all__ = ["mens_plan", "unsupported"]

# Seconds per unit of each of ``costs.COSTS``. cpu: one core of a server of 2024 (AVX-512), as ``measuring`` found them,
# divided by the cores below; in bfloat16 XLA's products are float32's there. cuda: nobody measured; about half of what
# the data sheet of an accelerator of 2023 promises, and a fifth of a millisecond for the launches of a layer.
_TYPICAL = {
    # products, adapter, attention, elementwise, logits, weights, layers, updates
    "jax_lora cpu bfloat16": (1.07e-11, 1.26e-11, 1.05e-11, 1.3e-09, 2.5e-09, 1.4e-09, 0.0002, 3e-09),
    "jax_lora cpu float32": (1.07e-11, 1.26e-11, 1.05e-11, 1.3e-09, 2.5e-09, 7e-10, 0.0002, 3e-09),
    "jax_qlora cpu bfloat16": (1.07e-11, 1.26e-11, 1.05e-11, 1.3e-09, 2.5e-09, 2.1e-09, 0.0002, 3e-09),
    "jax_qlora cpu float32": (1.07e-11, 1.26e-11, 1.05e-11, 1.3e-09, 2.5e-09, 1.4e-09, 0.0002, 3e-09),
    "jax_lora cuda bfloat16": (4e-15, 1e-14, 8e-15, 2e-12, 2e-11, 2e-12, 0.0002, 2e-11),
    "jax_lora cuda float32": (4e-14, 6e-14, 6e-14, 4e-12, 2e-11, 4e-12, 0.0002, 2e-11),
    "jax_qlora cuda bfloat16": (4e-15, 1e-14, 8e-15, 2e-12, 2e-11, 4e-12, 0.0002, 2e-11),
    "jax_qlora cuda float32": (4e-14, 6e-14, 6e-14, 4e-12, 2e-11, 8e-12, 0.0002, 2e-11),
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
    kernel = f"jax_{contract.adapter.method}"
    try:
        device = pick_device(contract.compute.device, machine)
    except ContractError as error:
        return KernelOffer(kernel=kernel, feasible=False, reason=str(error))
    reason = unsupported(layout)
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
    costs = step_costs(layout, weights, contract, _filled_up(workload))
    return attrs.evolve(
        offer,
        memory=memory_parts(contract, layout, weights, workload, device, dtype),
        seconds_per_step=step_seconds(costs, speed),
        seconds_source=speed.source,
    )


def unsupported(layout: Layout) -> str | None:
    """Say why this backend cannot build the model, in one sentence; None if it can. Reads no weight."""
    return obstacle(layout)


def _filled_up(workload: Workload) -> Workload:
    """The workload with the positions that are computed: each batch filled up to the size that holds an average one."""
    tiers = Buckets(workload.shape).tiers
    tokens, supervised = workload.tokens / workload.batches, workload.supervised / workload.batches
    fitting = [size for size in tiers if size.tokens >= tokens and size.supervised >= supervised]
    size = (fitting or tiers[-1:])[0]
    return attrs.evolve(workload, tokens=workload.batches * size.tokens, supervised=workload.batches * size.supervised)


def _typical(kernel: str, device: str, dtype: str, machine: Machine) -> Speed:
    """A speed for a machine on which nobody measured; its source says so."""
    on_cpu = device == "cpu"
    seconds = _TYPICAL[f"{kernel} {device.partition(':')[0]} {dtype}"]
    cores = machine.cpu_count if on_cpu else 1
    return Speed(
        seconds={name: value / cores for name, value in zip(COSTS, seconds, strict=True)}, source=_SOURCES[on_cpu]
    )
