"""The frozen base as transformers reads it: config.json and safetensors of one folder, every tensor accounted for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging as transformers_logging

from mens_core.errors import ModelError
from mens_core.plan import ExecutionPlan
from mens_torch._pages import MappedFiles

__all__ = ["load_base"]

_STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def load_base(plan: ExecutionPlan) -> Any:
    """Build the graph and read the weights, on the CPU; what the plan has whole takes its place.

    For method qlora the weights keep the files' own number format, so that NF4 codes are made from the exact
    values; ``model.load_model`` converts the rest. Files are mapped, not copied, where no conversion is needed.

    Args:
        plan: names the folder, the method and the number format.

    Returns:
        A transformers model in evaluation mode (no dropout) whose parameters are frozen.

    Raises:
        ModelError: if the folder cannot be read, or tensors are missing, left over, wrongly shaped or not finite.
    """
    folder = plan.model_dir
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            "the model folder holds an adapter, not a base",
            where=folder / "adapter_config.json",
            fix="merge the adapter into its base first, or point --model at the base",
        )
    try:
        quantised = plan.contract.adapter.method == "qlora"
        with _quiet():
            network, info = AutoModelForCausalLM.from_pretrained(
                str(folder),
                dtype=_stored_dtype(folder) if quantised else getattr(torch, plan.dtype),
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                ignore_mismatched_sizes=True,  # they are listed below, beside all other problems
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        raise ModelError(
            f"transformers cannot load the model folder: {error}",
            where=folder,
            expected="config.json of a causal language model and its *.safetensors",
        ) from error
    _check(network, info, folder)
    _replace(network, plan)
    # A folder may bring sampling settings; decoding here is greedy and takes nothing from them.
    network.generation_config = GenerationConfig()
    return network.eval().requires_grad_(requires_grad=False)


def _stored_dtype(folder: Path) -> torch.dtype:
    """The one float format of the folder's tensors; float32, which holds them all, if they are mixed."""
    found = set()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 (no mapping)
    floats = {name for name in found if name.startswith(("F", "BF"))}
    return _STORED.get(floats.pop(), torch.float32) if len(floats) == 1 else torch.float32


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' progress bar and load report away: what is wrong is raised, with names."""
    bar, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bar:
            transformers_logging.enable_progress_bar()


def _check(network: Any, info: Mapping[str, Any], folder: Path) -> None:
    problems = [f"{name} is missing" for name in sorted(info["missing_keys"])]
    problems += [f"{name} is left over" for name in sorted(info["unexpected_keys"])]
    problems += [
        f"{name} has shape {tuple(stored)}, the config asks for {tuple(wanted)}"
        for name, stored, wanted in sorted(info["mismatched_keys"])
    ]
    problems += list(info["error_msgs"])
    broken = {name for name, *_ in info["mismatched_keys"]} | set(info["missing_keys"])
    files = MappedFiles(folder)
    for name, tensor in network.state_dict().items():
        if name not in broken and not _finite(tensor):
            problems.append(f"{name} is not finite")
        files.was_read(tensor.nbytes)
    if problems:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        listing = "\n".join(f"  - {problem}" for problem in problems)
        raise ModelError(f"the weights do not fit config.json, {count}:\n{listing}", where=folder)


def _replace(network: Any, plan: ExecutionPlan) -> None:
    """Put the plan's whole tensors in the base's places; of a head and an embedding that were tied the other stays."""
    for name, array in plan.whole.items():
        path, _, leaf = name.rpartition(".")
        module = network.get_submodule(path)
        dtype = getattr(torch, plan.dtype) if getattr(module, leaf).dtype != torch.float32 else torch.float32
        setattr(module, leaf, nn.Parameter(torch.tensor(np.asarray(array, np.float32)).to(dtype), requires_grad=False))


def _finite(tensor: torch.Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    # Smallest and largest value carry a NaN or an infinity out without a mask as large as the tensor.
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low)) and bool(torch.isfinite(high))
