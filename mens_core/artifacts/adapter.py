"""The adapter on disk, in PEFT's format, and the older system's v3 manifest beside it.

    adapter_model.safetensors            base_model.model.<module>.lora_A.weight (R, in), .lora_B.weight (out, R)
    adapter_config.json                  PEFT's LoraConfig
    populi_adapter_manifest_v3.json      vox_mens_adapter, version 3

The inner names, ``<module>.lora_A.weight``, are those all backends share. A module that was trained whole is there by
its own names, ``base_model.model.<module>.weight``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mens_core.artifacts.files import write_json
from mens_core.artifacts.peft import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PEFT_PREFIX
from mens_core.artifacts.tensors import write_tensors
from mens_core.exchange import TrainingState
from mens_core.hf.hub import commit_of
from mens_core.plan import ExecutionPlan
from mens_core.sections import AdapterSpec

__all__ = [
    "V3_MANIFEST",
    "initial_state",
    "write_adapter",
]

V3_MANIFEST = "populi_adapter_manifest_v3.json"

Adapter = Mapping[str, NDArray[np.float32]]


def initial_state(adapter: Adapter, seed: int) -> TrainingState:
    """The start of a run: A Kaiming-uniform, B zero, so that the adapter is exactly the identity.

    What is trained whole starts as the base has it, and so does a freshly opened session.

    A is drawn from U(-1/√in, 1/√in), which is ``kaiming_uniform_(a=√5)`` of the reference implementation
    (github.com/microsoft/LoRA, layers.py), by a Philox generator keyed by sha256 of (seed, tensor name): the
    same numbers on every backend and in every module order.

    Args:
        adapter: as a freshly opened session states it.
        seed: of the contract.
    """
    start: dict[str, NDArray[np.float32]] = {}
    for name, tensor in adapter.items():
        start[name] = np.zeros(tensor.shape, np.float32) if ".lora_" in name else tensor
        if name.endswith(".lora_A.weight"):
            key = np.frombuffer(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:16], np.uint64)
            uniform = np.random.Generator(np.random.Philox(key=key)).random(tensor.shape, np.float32)
            start[name] = (2.0 * uniform - 1.0) / np.float32(np.sqrt(tensor.shape[1]))
    return TrainingState(adapter=start, optimizer={}, step=0)


def write_adapter(directory: Path, adapter: Adapter, plan: ExecutionPlan) -> None:
    """Write the files; each is replaced whole.

    The older system's manifest has one rank, one alpha and pairs alone, so that it is not written where layers have
    others or modules were trained whole.

    Args:
        directory: the run directory.
        adapter: shared name → array, float32.
        plan: of the run, for ranks, alphas and provenance.
    """
    tensors = {f"{PEFT_PREFIX}{name}": np.ascontiguousarray(tensor) for name, tensor in adapter.items()}
    write_tensors(directory / ADAPTER_WEIGHTS, tensors, {"format": "pt"})
    write_json(directory / ADAPTER_CONFIG, _peft_config(adapter, plan))
    if _is_uniform(adapter, plan.contract.adapter) and not _whole_modules(adapter):
        write_json(directory / V3_MANIFEST, _v3_manifest(adapter, plan))


def _plain(alpha: float) -> float | int:
    """A whole alpha as an integer, which is what older readers of both files expect."""
    return int(alpha) if alpha.is_integer() else alpha


def _modules(adapter: Adapter) -> list[str]:
    return [name.removesuffix(".lora_A.weight") for name in adapter if name.endswith(".lora_A.weight")]


def _whole_modules(adapter: Adapter) -> list[str]:
    return sorted({name.rpartition(".")[0] for name in adapter if ".lora_" not in name})


def _is_uniform(adapter: Adapter, spec: AdapterSpec) -> bool:
    """Whether all layers have the rank and the scale that the contract has for those that no pattern matches."""
    found = {(spec.rank_of(module), spec.scale_of(module)) for module in _modules(adapter)}
    return found == {(spec.rank, spec.scale)}


def _peft_config(adapter: Adapter, plan: ExecutionPlan) -> dict[str, Any]:
    spec = plan.contract.adapter
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": plan.model_name,
        # The commit itself: a branch that was asked for moves on.
        "revision": commit_of(plan.model_dir) or plan.contract.model.revision,
        "r": spec.rank,
        "lora_alpha": _plain(spec.alpha),
        "lora_dropout": spec.dropout,
        "use_rslora": spec.rslora,
        "use_dora": False,
        "bias": "none",
        # Full paths, so that a name shared by a module outside the adapter cannot be matched by suffix.
        "target_modules": sorted(_modules(adapter)),
        # Full paths again: PEFT takes every module whose path ends with the text, for norm input_layernorm, too.
        "modules_to_save": _whole_modules(adapter) or None,
        "rank_pattern": dict(spec.rank_pattern),
        "alpha_pattern": {pattern: _plain(alpha) for pattern, alpha in spec.alpha_pattern},
        "fan_in_fan_out": plan.layout.family == "gpt2",
        "init_lora_weights": True,
        "inference_mode": True,
        "layers_to_transform": None,
        "layers_pattern": None,
    }


def _v3_manifest(adapter: Adapter, plan: ExecutionPlan) -> dict[str, Any]:
    spec, modules = plan.contract.adapter, _modules(adapter)
    quantised = spec.method == "qlora"
    return {
        "format": "vox_mens_adapter",
        "version": 3,
        "adapter_method": spec.method,
        "quant": {
            "base_quant": "nf4" if quantised else "none",
            "double_quant": quantised and plan.contract.quant.double_quant,
        },
        "base_key_map": {module: f"{module}.weight" for module in modules},
        "layer_order": modules,
        "vocab": plan.layout.vocab_size,
        "d_model": plan.layout.hidden_size,
        "rank": spec.rank,
        # Its readers divide by the rank, whatever the run divided by.
        "alpha": _plain(spec.alpha * spec.rank**0.5 if spec.rslora else spec.alpha),
        "base_model": plan.model_name,
    }
