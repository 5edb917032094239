"""What this backend offers for a run, answered without loading JAX wherever that is possible."""

from __future__ import annotations

from mens_core.contract import FineTuneContract
from mens_core.errors import ContractError
from mens_core.exchange import KernelOffer, Machine
from mens_core.hf.layout import Layout
from mens_core.hookspecs import hookimpl
from mens_jax._families import obstacle
from mens_jax.device import capacity, pick_device, pick_dtype

__all__ = ["mens_plan", "unsupported"]


@hookimpl
def mens_plan(contract: FineTuneContract, layout: Layout, machine: Machine) -> KernelOffer:
    """See ``mens_core.hookspecs.mens_plan``."""
    kernel = f"jax_{contract.adapter.method}"
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
    return obstacle(layout)
