"""An adapter written in another format; what that format cannot say is refused by name, or noted.

    peft   adapter_model.safetensors, adapter_config.json
    v2     adapter.safetensors, adapter_meta_v2.json              the older system's, of an NF4 base
    v3     adapter.safetensors, populi_adapter_manifest_v3.json   the older system's
    mlx    adapters.safetensors, adapter_config.json              mlx-lm's

The numbers of A and B are the same in all of them. A format that knows alpha instead of the scale gets the alpha whose
quotient by the rank is the scale; where no float64 has that quotient, the nearest.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from mens_core.artifacts.adapter import V3_MANIFEST
from mens_core.artifacts.adapters import open_adapter
from mens_core.artifacts.files import write_json
from mens_core.artifacts.formats import FORMATS
from mens_core.artifacts.lora import LoraAdapter, alpha_of
from mens_core.artifacts.meta import META_WEIGHTS, V2_META
from mens_core.artifacts.mlx import write_mlx
from mens_core.artifacts.names import full_name
from mens_core.artifacts.peft import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PEFT_PREFIX
from mens_core.artifacts.rundir import MANIFEST
from mens_core.artifacts.tensors import write_tensors
from mens_core.atomic import appearing
from mens_core.errors import ModelError
from mens_core.exchange import NF4Spec
from mens_core.hf.files import find_file, read_json

__all__ = ["convert_adapter"]

# Tables of tokens: PEFT keeps the update of one under other names and in another orientation.
_TABLES = ("embed_tokens", "wte", "wpe")


def convert_adapter(
    path: str | Path,
    to: str,
    output: str | Path,
    *,
    meta: str | Path | None = None,
    method: str | None = None,
) -> dict[str, Any]:
    """Write an adapter in another format.

    Args:
        path: a run's folder, or any adapter that can be read.
        to: one of ``FORMATS``.
        output: folder to make.
        meta: description of an adapter of version 2 or 3.
        method: ``lora`` or ``qlora``, of an adapter whose files do not say it; v2 and v3 do.

    Returns:
        ``from``, ``to``, ``output``, ``files``, ``modules``, and ``notes``: what the new files do not say.

    Raises:
        ModelError: if the adapter cannot be read, the format cannot say what it is, the method contradicts its files,
            or the folder holds something.
    """
    adapter = open_adapter(Path(path), Path(meta) if meta else None)
    if to not in _WRITERS:
        raise ModelError(f"there is no format {to!r}", expected=f"one of {', '.join(FORMATS)}")
    if method is not None and adapter.method not in {None, method}:
        raise ModelError(
            f"the adapter was trained as {adapter.method}, not as {method}", where=adapter.source, fix="no --method"
        )
    with appearing(Path(output)) as folder:
        notes = _WRITERS[to](folder, attrs.evolve(adapter, method=adapter.method or method))
        files = sorted(file.name for file in folder.iterdir())
    return {
        "from": adapter.kind,
        "to": to,
        "output": str(output),
        "files": files,
        "modules": len(adapter.pairs),
        "notes": notes,
    }


def _write_peft(folder: Path, adapter: LoraAdapter) -> list[str]:
    tables = [module for module in adapter.modules if module.endswith(_TABLES)]
    if tables:
        raise _cannot("PEFT", "update a table of tokens as a linear layer", tables, adapter)
    tensors: dict[str, NDArray[Any]] = {
        f"{PEFT_PREFIX}{full_name(name)}": whole for name, whole in adapter.whole.items()
    }
    for module, pair in zip(adapter.modules, adapter.pairs.values(), strict=True):
        tensors[f"{PEFT_PREFIX}{full_name(module)}.lora_A.weight"] = pair.a
        tensors[f"{PEFT_PREFIX}{full_name(module)}.lora_B.weight"] = pair.b
    write_tensors(folder / ADAPTER_WEIGHTS, _contiguous(tensors), {"format": "pt"})
    write_json(folder / ADAPTER_CONFIG, _peft_config(adapter))
    return _not_said(adapter)


def _peft_config(adapter: LoraAdapter) -> dict[str, Any]:
    pairs = {full_name(module): pair for module, pair in zip(adapter.modules, adapter.pairs.values(), strict=True)}
    rank, scale = adapter.usual()
    alphas = {module: alpha_of(pair.scale, pair.rank) for module, pair in pairs.items()}
    alpha = alpha_of(scale, rank)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base_model,
        "revision": adapter.config.get("revision"),
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": _dropout(adapter.config),
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "target_modules": sorted(pairs),
        "modules_to_save": adapter.config.get("modules_to_save") if adapter.whole else None,
        "rank_pattern": {module: pair.rank for module, pair in pairs.items() if pair.rank != rank},
        "alpha_pattern": {module: own for module, own in alphas.items() if own != alpha},
        # GPT-2's layers are Conv1D, stored (in, out).
        "fan_in_fan_out": any(module.startswith("transformer.h.") for module in pairs),
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _write_mlx(folder: Path, adapter: LoraAdapter) -> list[str]:
    rank, scale = _uniform("mlx-lm", adapter)
    write_mlx(folder, adapter, rank=rank, scale=scale, dropout=_dropout(adapter.config))
    return _not_said(adapter)


def _write_v2(folder: Path, adapter: LoraAdapter) -> list[str]:
    if adapter.method == "lora":
        raise ModelError(
            "version 2 is of adapters of an NF4 base alone, and this one's base was not quantised",
            where=adapter.source,
            fix="--to v3",
        )
    _, nf4 = _storage("version 2", adapter)
    if not nf4.double_quant:
        raise ModelError(
            "version 2 cannot say that absmax values were not quantised", where=adapter.source, fix="--to v3"
        )
    head = {"format": "vox_mens_qlora_lora_only_v2", "version": 2, "embed_key": _embed_key(adapter)}
    return _write_meta(folder / V2_META, adapter, head, "version 2")


def _write_v3(folder: Path, adapter: LoraAdapter) -> list[str]:
    method, nf4 = _storage("version 3", adapter)
    quantised = method == "qlora"
    head = {
        "format": "vox_mens_adapter",
        "version": 3,
        "adapter_method": method,
        "quant": {"base_quant": "nf4" if quantised else "none", "double_quant": quantised and nf4.double_quant},
    }
    return _write_meta(folder / V3_MANIFEST, adapter, head, "version 3")


def _write_meta(path: Path, adapter: LoraAdapter, head: Mapping[str, Any], name: str) -> list[str]:
    rank, scale = _uniform(name, adapter)
    keys = _logical_keys(adapter)
    tensors: dict[str, NDArray[Any]] = {}
    for logical, pair in zip(keys, adapter.pairs.values(), strict=True):
        tensors |= {f"{logical}.lora_a": pair.a, f"{logical}.lora_b": pair.b}
    write_tensors(path.with_name(META_WEIGHTS), _contiguous(tensors), {"format": "pt"})
    described = {
        **head,
        "base_key_map": keys,
        "layer_order": list(keys),
        **_sizes(adapter),
        "rank": rank,
        "alpha": alpha_of(scale, rank),
        "base_model": adapter.base_model,
    }
    write_json(path, {field: value for field, value in described.items() if value is not None})
    absent = [field for field in ("embed_key", "vocab", "d_model", "base_model") if described.get(field, "") is None]
    notes = [f"the adapter does not say {field}, so neither do the new files" for field in absent]
    if isinstance(described["alpha"], float):
        notes.append(f"alpha is {described['alpha']:g}: the older system itself reads whole ones alone")
    dropout = _dropout(adapter.config)
    return notes + ([f"{name} does not say that the input had a dropout of {dropout:g}"] if dropout else [])


def _sizes(adapter: LoraAdapter) -> dict[str, Any]:
    """Vocabulary and width of the base: by the adapter's description, or by its run's manifest."""
    names = {"vocab": "vocab_size", "d_model": "d_model"}
    record = find_file(adapter.source, MANIFEST) if adapter.source.is_dir() else None
    manifest = read_json(record, expected="the manifest of a run") if record is not None else {}
    return {name: adapter.config.get(name, manifest.get(other)) for name, other in names.items()}


def _uniform(name: str, adapter: LoraAdapter) -> tuple[int, float]:
    """The one rank and the one scale of an adapter of pairs alone."""
    if adapter.whole:
        raise _cannot(name, "hold tensors trained whole", list(adapter.whole), adapter)
    rank, scale = adapter.usual()
    other = [
        f"{module} (rank {pair.rank}, scale {pair.scale:g})"
        for module, pair in zip(adapter.modules, adapter.pairs.values(), strict=True)
        if (pair.rank, pair.scale) != (rank, scale)
    ]
    if other:
        raise _cannot(name, f"say a rank or scale other than {rank} and {scale:g}", other, adapter)
    return rank, scale


def _storage(name: str, adapter: LoraAdapter) -> tuple[str, NF4Spec]:
    """How the base was stored in training; where it was not quantised, the second half means nothing."""
    if adapter.method is None:
        raise ModelError(
            f"{name} says whether the base was quantised, and the adapter's files do not",
            where=adapter.source,
            fix="--method lora, or --method qlora",
        )
    nf4, usual = adapter.nf4 or NF4Spec(), NF4Spec()
    if adapter.method == "qlora" and attrs.evolve(nf4, double_quant=True) != usual:
        raise ModelError(
            f"{name} cannot say how the base was quantised: {nf4}",
            where=adapter.source,
            expected=f"blocks of {usual.block_size} weights",
        )
    return adapter.method, nf4


def _logical_keys(adapter: LoraAdapter) -> dict[str, str]:
    """Logical name → name of the base's tensor, in the order of the pairs; the adapter's own where it has some."""
    named = adapter.config.get("base_key_map", {})
    own = {named[logical]: logical for logical in adapter.config.get("layer_order", ())}
    return {own.get(key, module): key for module, key in zip(adapter.modules, adapter.pairs, strict=True)}


def _embed_key(adapter: LoraAdapter) -> str | None:
    """The table of tokens, as the base of a known kind calls it."""
    known = adapter.config.get("embed_key") or adapter.config.get("base_key_map", {}).get("lm_head")
    if known:
        return str(known)
    tables = {"model.layers.": "model.embed_tokens", "transformer.h.": "transformer.wte", "h.": "wte"}
    stems = {table for module in adapter.modules for stem, table in tables.items() if module.startswith(stem)}
    return f"{stems.pop()}.weight" if len(stems) == 1 else None


def _dropout(config: Mapping[str, Any]) -> float:
    parameters = config.get("lora_parameters")
    found = config.get("lora_dropout") or (parameters.get("dropout") if isinstance(parameters, dict) else 0.0)
    return float(found or 0.0)


def _not_said(adapter: LoraAdapter) -> list[str]:
    return ["the new files do not say that the base was quantised to NF4"] if adapter.method == "qlora" else []


def _contiguous(tensors: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


def _cannot(name: str, what: str, found: list[str], adapter: LoraAdapter) -> ModelError:
    more = f" and {len(found) - 5} more" if len(found) > 5 else ""
    return ModelError(f"{name} cannot {what}: {', '.join(found[:5])}{more}", where=adapter.source)


_WRITERS = {"peft": _write_peft, "v2": _write_v2, "v3": _write_v3, "mlx": _write_mlx}
