"""An adapter from whatever path was given: a folder in PEFT's format, or a file with its description."""

from __future__ import annotations

from pathlib import Path

from mens_core.artifacts.lora import LoraAdapter
from mens_core.artifacts.meta import read_meta_adapter
from mens_core.artifacts.peft import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_peft
from mens_core.errors import ModelError

__all__ = ["open_adapter", "weights_of"]

_NOT_THERE = "a folder with adapter_model.safetensors, or a safetensors file"


def weights_of(path: Path) -> Path:
    """The weight file of an adapter that ``open_adapter`` opens."""
    return path / ADAPTER_WEIGHTS if path.is_dir() else path


def open_adapter(path: Path, meta: Path | None = None) -> LoraAdapter:
    """Read an adapter.

    Args:
        path: a run's folder, a folder in PEFT's format, or the safetensors file of either.
        meta: the description of an adapter of the older system, version 2 or 3, or an ``adapter_config.json``.

    Raises:
        ModelError: if it is not there, is pickled, or is no adapter; see ``read_peft`` and ``read_meta_adapter``.
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
    if not path.is_dir() and not (folder / ADAPTER_CONFIG).exists():
        raise ModelError(
            "a safetensors file alone does not say what rank, scale and layers it has",
            where=path,
            expected=f"{ADAPTER_CONFIG} beside it, or its description",
            fix="--meta FILE",
        )
    return read_peft(folder)
