"""Adapters in the layout of mlx-lm, Apple's library for language models on its own chips.

    adapters.safetensors      <module>.lora_a (in, R), <module>.lora_b (R, out)
    adapter_config.json       fine_tune_type, num_layers, lora_parameters: rank, scale, dropout, keys

Both halves lie the other way round than PEFT's, there is one rank and one scale, and the scale is what the product is
multiplied by, not divided by the rank. ``keys`` are paths inside a block; ``num_layers`` counts blocks from the last
one, -1 for all; a layer that is wrapped and has no tensors stays as it was, since its B is zero.

Source: github.com/ml-explore/mlx-lm, ``tuner/lora.py`` and ``tuner/utils.py`` (``linear_to_lora_layers``,
``load_adapters``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from mens_core.artifacts.files import write_json
from mens_core.artifacts.lora import LoraAdapter, LoraPair
from mens_core.artifacts.names import from_mlx, in_mlx, within_block
from mens_core.artifacts.tensors import read_tensors, write_tensors
from mens_core.errors import ModelError
from mens_core.hf.files import find_file

__all__ = ["MLX_CONFIG", "MLX_WEIGHTS", "is_mlx", "read_mlx", "write_mlx"]

MLX_WEIGHTS = "adapters.safetensors"
MLX_CONFIG = "adapter_config.json"

_A, _B = ".lora_a", ".lora_b"
_ALL_LAYERS = -1


def is_mlx(config: Any) -> TypeGuard[dict[str, Any]]:
    """Whether an ``adapter_config.json`` is of mlx-lm; PEFT's names its kind."""
    return isinstance(config, dict) and "peft_type" not in config and "lora_parameters" in config


def read_mlx(folder: Path, config: Mapping[str, Any]) -> LoraAdapter:
    """Read a folder in mlx-lm's layout.

    Args:
        folder: that holds the adapter.
        config: its ``adapter_config.json``.

    Raises:
        ModelError: if it is no LoRA adapter, rank or scale are missing, a tensor is no part of one, half a pair is
            missing, a rank differs from the configuration, a module's counterpart in transformers is not known, or a
            number is not finite.
    """
    path = folder / MLX_CONFIG
    kind = config.get("fine_tune_type", "lora")
    if kind != "lora" or config.get("use_dora"):
        raise ModelError(
            f"fine_tune_type is {kind!r}" if kind != "lora" else "use_dora is set",
            where=path,
            expected="lora: low-rank updates of linear layers",
        )
    rank, scale = _numbers(path, config["lora_parameters"])
    weights = find_file(folder, MLX_WEIGHTS)
    if weights is None:
        raise ModelError(f"the adapter folder has no {MLX_WEIGHTS}", where=folder, expected="a folder of mlx-lm's")
    adapter = LoraAdapter(
        source=folder,
        kind="mlx",
        method=None,
        pairs=_pairs(weights, rank, scale),
        base_model=config.get("model"),
        config=config,
    )
    adapter.check()
    return adapter


def write_mlx(folder: Path, adapter: LoraAdapter, *, rank: int, scale: float, dropout: float) -> None:
    """Write the two files.

    Args:
        folder: exists.
        adapter: pairs alone, all of one rank and scale.
        rank: of every pair.
        scale: s, of every pair.
        dropout: on the input, a probability.

    Raises:
        ModelError: if mlx-lm is not known to have a module of that name.
    """
    paths = {module: in_mlx(module) for module in adapter.modules}
    strange = [module for module, path in paths.items() if path is None]
    if strange:
        raise ModelError(
            f"what mlx-lm calls {', '.join(strange[:5])} is not known",
            where=adapter.source,
            expected="linear layers in model.layers or transformer.h, or lm_head",
        )
    tensors: dict[str, NDArray[np.float32]] = {}
    for path, pair in zip(paths.values(), adapter.pairs.values(), strict=True):
        tensors[f"{path}{_A}"] = np.ascontiguousarray(pair.a.T)
        tensors[f"{path}{_B}"] = np.ascontiguousarray(pair.b.T)
    write_tensors(folder / MLX_WEIGHTS, tensors, {"format": "mlx"})
    keys = sorted({within_block(module) for module in adapter.modules})
    described = {
        "fine_tune_type": "lora",
        "model": adapter.base_model,
        "num_layers": _ALL_LAYERS,
        "lora_parameters": {"rank": rank, "scale": scale, "dropout": dropout, "keys": keys},
    }
    write_json(folder / MLX_CONFIG, described)


def _numbers(path: Path, parameters: Any) -> tuple[int, float]:
    """Rank and scale."""
    found = parameters if isinstance(parameters, dict) else {}
    rank, scale = found.get("rank"), found.get("scale")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ModelError(f"rank is {rank!r}", where=f"{path}, lora_parameters", expected="a whole number of at least 1")
    if not isinstance(scale, int | float) or isinstance(scale, bool) or not math.isfinite(scale):
        raise ModelError(f"scale is {scale!r}", where=f"{path}, lora_parameters", expected="a number")
    return rank, float(scale)


def _pairs(weights: Path, rank: int, scale: float) -> dict[str, LoraPair]:
    halves: dict[str, dict[str, NDArray[np.float32]]] = {}
    for name, tensor in read_tensors(weights).items():
        if not name.endswith((_A, _B)) or tensor.ndim != 2:
            raise ModelError(
                f"the adapter holds a tensor that is no part of a linear layer's update: {name} {tensor.shape}",
                where=weights,
                expected="<module>.lora_a (in, R) and <module>.lora_b (R, out)",
            )
        halves.setdefault(name[: -len(_A)], {})[name[-len(_A) :]] = np.ascontiguousarray(tensor.T, np.float32)
    pairs = {}
    for path, found in halves.items():
        module = from_mlx(path)
        if module is None:
            raise ModelError(
                f"what transformers calls {path} is not known",
                where=weights,
                expected="linear layers in model.layers or model.h, or lm_head",
            )
        if set(found) != {_A, _B}:
            missing = _A if _A not in found else _B
            raise ModelError(f"half of an update is missing: {path}{missing}", where=weights, expected="both halves")
        if found[_A].shape[0] != rank:
            raise ModelError(
                f"{path} has rank {found[_A].shape[0]}, its configuration says {rank}",
                where=weights,
                expected="the same rank in both",
            )
        pairs[f"{module}.weight"] = LoraPair(a=found[_A], b=found[_B], scale=scale)
    return pairs
