"""What this installation can do: interpreter, packages, machine, kernels, settings from the environment."""

from __future__ import annotations

import importlib.metadata
import os
from typing import Any

from mens_core.contract import METHODS, FineTuneContract
from mens_core.errors import MensError
from mens_core.machine import this_machine
from mens_core.planner import decide
from mens_core.plugins import installed_backends, load_backend
from mens_core.speeds import read_speeds, speeds_file

__all__ = ["examine"]

# What is read here, or by what is used here.
_VARIABLES = {
    "MENS_TRACE_HOOKS": "1 prints every call of a hook",
    "XDG_CACHE_HOME": "where measured speeds are kept (default ~/.cache)",
    "OMP_NUM_THREADS": "threads of a backend's products on a CPU",
    "HF_HOME": "where models from the hub are kept",
    "HF_HUB_OFFLINE": "1 keeps the hub's client off the network",
}

_PACKAGES = (
    "mens-core",
    "numpy",
    "tokenizers",
    "huggingface-hub",
    "torch",
    "transformers",
    "bitsandbytes",
    "jax",
    "jaxlib",
    "flax",
    "optax",
)


def examine() -> dict[str, Any]:
    """Look at everything; every backend that is complete is imported, to see that it can be."""
    machine = this_machine()
    return {
        "python": machine.python,
        "platform": machine.platform,
        "processor": machine.processor,
        "processors": machine.cpu_count,
        "memory_bytes": machine.memory_bytes,
        "accelerator_drivers": list(machine.accelerators),
        "packages": {name: _version(name) for name in _PACKAGES},
        "kernels": {
            f"{info.name}_{method}": _state(info.name, method) for info in installed_backends() for method in METHODS
        },
        "speeds": {key: speed.source for key, speed in read_speeds(machine).items()},
        "speeds_file": str(speeds_file()),
        "variables": {
            name: {"value": os.environ.get(name), "meaning": meaning} for name, meaning in _VARIABLES.items()
        },
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _state(backend: str, method: str) -> dict[str, Any]:
    """Whether a kernel can run the lab base here, and on which device."""
    try:
        plugin = load_backend(backend).plugin
        contract = FineTuneContract.from_fields(trains=False, backend=backend, method=method)
        plan = decide(contract, trains=False)
    except MensError as error:
        return {"ready": False, "obstacle": error.what, "fix": error.fix}
    found = {"device": plan.device, "dtype": plan.dtype, "device_memory_bytes": plan.offer.capacity_bytes}
    return {"ready": True, "plugin": plugin, **found}
