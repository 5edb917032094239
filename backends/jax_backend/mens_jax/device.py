"""Where a run computes, and in which number format.

XLA lowers the precision of float32 products on accelerators unless told otherwise; every product of this
backend asks for the highest (``_arrays.dot``), so float32 here means float32.
"""

from __future__ import annotations

from mens_core.errors import ContractError
from mens_core.plan import Machine

__all__ = ["capacity", "pick_device", "pick_dtype"]


def pick_device(requested: str, machine: Machine) -> str:
    """Name the device of a run; allocates nothing.

    Args:
        requested: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``; ``auto`` is the first accelerator if there is one.
        machine: with no accelerator's driver on it JAX need not be asked.

    Returns:
        ``cpu`` or ``cuda:N``.

    Raises:
        ContractError: if this machine, as JAX sees it, has no such device.
    """
    present = ["cpu", *(f"cuda:{index}" for index in range(_count_gpus(machine)))]
    device = {"auto": present[min(1, len(present) - 1)], "cuda": "cuda:0"}.get(requested, requested)
    if device not in present:
        raise ContractError(
            f"JAX finds no device {requested!r} on this machine",
            where=f"device = {requested!r}",
            expected=f"auto or one of {', '.join(present)}",
            fix="--device auto, or a jaxlib for the accelerator: pip install 'jax[cuda12]'",
        )
    return device


def pick_dtype(requested: str, device: str) -> str:
    """Name the number format of the frozen base and the activations.

    Args:
        requested: ``auto``, ``float32`` or ``bfloat16``.
        device: from ``pick_device``.

    Returns:
        ``float32`` or ``bfloat16``; for ``auto`` float32 on a CPU and bfloat16 on an accelerator.
    """
    if requested != "auto":
        return requested
    return "float32" if device == "cpu" else "bfloat16"


def capacity(device: str, machine: Machine) -> int:
    """Memory of a device from ``pick_device``, in bytes."""
    if device == "cpu":
        return machine.memory_bytes
    # heavy: only a machine with an accelerator waits for it
    import jax  # noqa: PLC0415

    place = jax.devices("gpu")[int(device.partition(":")[2])]
    return int(place.memory_stats()["bytes_limit"])


def _count_gpus(machine: Machine) -> int:
    if not machine.accelerators:
        return 0
    # heavy: only a machine with an accelerator waits for it
    import jax  # noqa: PLC0415

    try:
        return len(jax.devices("gpu"))
    except RuntimeError:  # how JAX says that its build or this machine knows no such platform
        return 0
