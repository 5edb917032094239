"""An adapter from whatever path was given: a folder in PEFT's or mlx-lm's format, or a file with its description."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mens_core.artifacts.adapter import V3_MANIFEST
from mens_core.artifacts.lora import LoraAdapter
from mens_core.artifacts.meta import META_WEIGHTS, V2_META, read_meta_adapter
from mens_core.artifacts.mlx import MLX_WEIGHTS, is_mlx, read_mlx
from mens_core.artifacts.peft import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_peft
from mens_core.errors import ModelError
from mens_core.hf.files import find_file, read_json

__all__ = ["open_adapter", "weights_of"]

_NOT_THERE = "a folder with adapter_model.safetensors, or a safetensors file"
_CONFIG = "adapter_config.json as PEFT or mlx-lm writes it"


def weights_of(path: Path) -> Path:
    """The weight file of an adapter that ``open_adapter`` opens."""
    if not path.is_dir():
        return path
    if _description(path) is not None:
        return path / META_WEIGHTS
    return path / (MLX_WEIGHTS if is_mlx(_config(path)) else ADAPTER_WEIGHTS)


def open_adapter(path: Path, meta: Path | None = None) -> LoraAdapter:
    """Read an adapter.

    Args:
        path: a run's folder, a folder in PEFT's or mlx-lm's format or as ``convert_adapter`` makes it, or the
            safetensors file in it.
        meta: the description of an adapter of the older system, version 2 or 3, or an ``adapter_config.json``.

    Raises:
        ModelError: if it is not there, is pickled, or is no adapter; see ``read_peft``, ``read_mlx`` and
            ``read_meta_adapter``.
    """
    if path.suffix.lower() == ".bin":
        raise ModelError(
            "a *.bin checkpoint is pickled, and pickles are refused: loading one runs its code",
            where=path,
            expected="an adapter in safetensors",
            fix="train writes adapter_model.safetensors; merge-weights merges an adapter of a base that was not "
            "quantised, merge-qlora one of an NF4 base: see docs/merging.md",
        )
    if not path.exists():
        raise ModelError("there is no such adapter", where=path, expected=_NOT_THERE)
    if meta is not None and meta.name != ADAPTER_CONFIG:
        if not meta.is_file():
            raise ModelError("there is no such description", where=meta, expected="--meta FILE of the adapter")
        return read_meta_adapter(path, meta)
    folder = path if path.is_dir() else path.parent
    description = _description(folder)
    if description is not None:
        return read_meta_adapter(folder / META_WEIGHTS, description)
    if not path.is_dir() and not (folder / ADAPTER_CONFIG).exists():
        raise ModelError(
            "a safetensors file alone does not say what rank, scale and layers it has",
            where=path,
            expected=f"{ADAPTER_CONFIG} beside it, or its description",
            fix="--meta FILE",
        )
    config = _config(folder)
    return read_mlx(folder, config) if is_mlx(config) else read_peft(folder)


def _config(folder: Path) -> Any:
    """What ``adapter_config.json`` holds; None without one."""
    found = find_file(folder, ADAPTER_CONFIG)
    return read_json(found, expected=_CONFIG) if found is not None else None


def _description(folder: Path) -> Path | None:
    """The description of an adapter of version 2 or 3, in a folder that holds one and nothing in another format."""
    if (folder / ADAPTER_CONFIG).exists() or not (folder / META_WEIGHTS).exists():
        return None
    return next((folder / name for name in (V2_META, V3_MANIFEST) if (folder / name).exists()), None)
