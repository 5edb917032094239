"""Where a run computes, and in which number format.

PyTorch multiplies float32 matrices in full float32 unless a program asks for less; a session refuses to open
where that was done (``step.open_session``), so float32 here means float32.
"""

from __future__ import annotations

from mens_core.errors import ContractError
from mens_core.plan import Machine

__all__ = ["capacity", "pick_device", "pick_dtype"]


def pick_device(requested: str, machine: Machine) -> str:
    """Name the device of a run; allocates nothing.

    Args:
        requested: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``; ``auto`` is the first accelerator if there is one.
        machine: with no accelerator's driver on it PyTorch need not be asked.

    Returns:
        ``cpu`` or ``cuda:N``.

    Raises:
        ContractError: if this machine, as PyTorch sees it, has no such device.
    """
    present = ["cpu", *(f"cuda:{index}" for index in range(_count_gpus(machine)))]
    device = {"auto": present[min(1, len(present) - 1)], "cuda": "cuda:0"}.get(requested, requested)
    if device not in present:
        raise ContractError(
            f"PyTorch finds no device {requested!r} on this machine",
            where=f"device = {requested!r}",
            expected=f"auto or one of {', '.join(present)}",
            fix="--device auto, or a PyTorch build for the accelerator",
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
    import torch  # noqa: PLC0415

    return int(torch.cuda.get_device_properties(device).total_memory)


def _count_gpus(machine: Machine) -> int:
    if not machine.accelerators:
        return 0
    # heavy: only a machine with an accelerator waits for it
    import torch  # noqa: PLC0415

    return torch.cuda.device_count()
