"""Adapters in PEFT's format, read strictly: every tensor has its place, and nothing that is asked for is missing.

Source: github.com/huggingface/peft, ``utils/save_and_load.py`` for names, ``tuners/lora`` for ranks and scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mens_core.artifacts.lora import LoraAdapter, LoraPair, Targets
from mens_core.artifacts.rundir import MANIFEST
from mens_core.artifacts.tensors import read_tensors
from mens_core.errors import ModelError
from mens_core.exchange import NF4Spec
from mens_core.hf.files import find_file, read_json
from mens_core.patterns import check_pattern, number_of

__all__ = ["ADAPTER_CONFIG", "ADAPTER_WEIGHTS", "PEFT_PREFIX", "read_peft", "read_peft_config", "saved_whole"]

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
PEFT_PREFIX = "base_model.model."

_A, _B = ".lora_A.weight", ".lora_B.weight"
_CONFIG = 'adapter_config.json as PEFT writes it, with "peft_type": "LORA"'
# What changes the result and is not computed here; read over, it would give wrong answers in silence.
_BEYOND: dict[str, Any] = {
    "use_dora": False,
    "bias": "none",
    "lora_bias": False,
    "use_qalora": False,
    "trainable_token_indices": None,
    "layer_replication": None,
    "target_parameters": None,
    "alora_invocation_tokens": None,
    "arrow_config": None,
}

_NUMBERS = {"r": int, "lora_alpha": int | float}
_LARGEST = 1e9
_NAMES = "names, or one pattern"


def read_peft(folder: Path) -> LoraAdapter:
    """Read a folder in PEFT's format; a run's own manifest, where it lies beside, says what the base was.

    Raises:
        ModelError: if a file is missing or malformed, a tensor is no part of a LoRA adapter, half a pair is missing,
            ranks differ from the configuration, a module that it names has no tensors, or a number is not finite.
    """
    config = read_peft_config(folder)
    weights = find_file(folder, ADAPTER_WEIGHTS)
    if weights is None:
        raise _no_weights(folder)
    pairs: dict[str, dict[str, NDArray[np.float32]]] = {}
    whole: dict[str, NDArray[Any]] = {}
    for name, tensor in read_tensors(weights).items():
        inner = name.removeprefix(PEFT_PREFIX)
        if inner != name and inner.endswith((_A, _B)):
            pairs.setdefault(inner[: -len(_A)], {})[inner[-len(_A) :]] = np.asarray(tensor, np.float32)
        elif inner != name and _is_whole(inner, config):
            whole[inner] = tensor
        else:
            raise ModelError(f"the adapter holds a tensor that is no part of a LoRA adapter: {name}", where=weights)
    adapter = LoraAdapter(
        source=folder,
        kind="peft",
        pairs={f"{module}.weight": _pair(module, halves, config, weights) for module, halves in pairs.items()},
        whole=whole,
        targets=_targets(config, folder),
        config=config,
        **_provenance(folder, config),
    )
    adapter.check()
    _check_named(adapter, weights)
    return adapter


def read_peft_config(folder: Path) -> dict[str, Any]:
    """Read ``adapter_config.json``.

    Raises:
        ModelError: if it is missing or not a JSON object of a LoRA adapter, or the adapter is more than LoRA.
    """
    path = find_file(folder, ADAPTER_CONFIG)
    if path is None:
        raise ModelError(
            f"the adapter folder has no {ADAPTER_CONFIG}", where=folder, expected="a folder written by train or by PEFT"
        )
    config = read_json(path, expected=_CONFIG)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ModelError(f"{ADAPTER_CONFIG} does not describe a LoRA adapter", where=path, expected=_CONFIG)
    beyond = [name for name, plain in _BEYOND.items() if (config.get(name) or plain) != plain]
    if beyond:
        raise ModelError(
            f"the adapter is more than LoRA: {', '.join(f'{name} = {config[name]!r}' for name in beyond)}",
            where=path,
            expected="low-rank updates of linear layers, without bias and without DoRA",
        )
    for name, kind in _NUMBERS.items():
        if not _is_positive(config.get(name), kind):
            raise ModelError(f"{name} is {config.get(name)!r:.100}", where=path, expected="a positive number")
    whole = config.get("modules_to_save") or ()
    if not _are_names(whole) or "" in whole:
        raise ModelError(f"modules_to_save is {whole!r:.100}", where=path, expected="a list of names")
    for name, kind in {"rank_pattern": int, "alpha_pattern": int | float}.items():
        patterns = config.get(name) or {}
        if not isinstance(patterns, dict) or not all(_is_positive(value, kind) for value in patterns.values()):
            raise ModelError(f"{name} is {patterns!r:.100}", where=path, expected="patterns with positive numbers")
    return config


def _is_positive(value: object, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and 0 < value < _LARGEST


def _no_weights(folder: Path) -> ModelError:
    pickled = [path.name for path in sorted(folder.glob("*")) if path.suffix.lower() in {".bin", ".pt", ".pth"}]
    if pickled:
        return ModelError(
            f"the adapter's weights are pickled ({pickled[0]}) and pickles are refused: loading one runs its code",
            where=folder,
            expected=ADAPTER_WEIGHTS,
            fix="save it again on a machine you trust: PEFT's save_pretrained writes safetensors",
        )
    return ModelError(
        f"the adapter folder has no {ADAPTER_WEIGHTS}", where=folder, expected="a folder written by train or by PEFT"
    )


def saved_whole(name: str, config: Mapping[str, Any]) -> bool:
    """Whether a tensor belongs to a module that ``modules_to_save`` names.

    PEFT takes every module whose path ends with a name, with whatever is inside: ``norm`` is ``input_layernorm``, too
    (``utils/other.py``, ``_set_trainable``).
    """
    steps = name.split(".")[:-1]
    paths = [".".join(steps[: count + 1]) for count in range(len(steps))]
    return any(path.endswith(entry) for path in paths for entry in config.get("modules_to_save") or ())


def _is_whole(name: str, config: Mapping[str, Any]) -> bool:
    """Whether a tensor is saved whole; PEFT adds embeddings that were given new rows to those that are named."""
    *_, module, part = f".{name}".split(".")
    return part in {"weight", "bias"} and (saved_whole(name, config) or module in {"embed_tokens", "wte", "lm_head"})


def _pair(module: str, halves: Mapping[str, NDArray[np.float32]], config: Mapping[str, Any], weights: Path) -> LoraPair:
    if set(halves) != {_A, _B}:
        missing = _A if _A not in halves else _B
        raise ModelError(f"half of an update is missing: {module}{missing}", where=weights, expected="both A and B")
    rank = _of_pattern(config.get("rank_pattern"), module, config["r"])
    alpha = _of_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    found = halves[_A].shape[0] if halves[_A].ndim else 0
    if found != rank:
        raise ModelError(
            f"{module} has rank {found}, its configuration says {rank}", where=weights, expected="the same rank in both"
        )
    return LoraPair(a=halves[_A], b=halves[_B], scale=alpha / rank**0.5 if config.get("use_rslora") else alpha / rank)


def _of_pattern(patterns: Any, module: str, default: Any) -> Any:
    return number_of([(check_pattern(key), value) for key, value in (patterns or {}).items()], module, default)


def _targets(config: Mapping[str, Any], folder: Path) -> Targets | None:
    names, layers = config.get("target_modules"), config.get("layers_to_transform")
    if config.get("layers_pattern"):
        # Whose names the layers' list has is a matter of the model; what is there is then taken for what was asked.
        return None
    if isinstance(names, str) or (isinstance(names, list) and names and all(isinstance(name, str) for name in names)):
        excluded = config.get("exclude_modules") or ()
        if not isinstance(excluded, str) and not _are_names(excluded):
            raise ModelError(f"exclude_modules is {excluded!r:.100}", where=folder / ADAPTER_CONFIG, expected=_NAMES)
        if not (layers is None or _is_layer(layers) or (isinstance(layers, list) and all(map(_is_layer, layers)))):
            raise ModelError(
                f"layers_to_transform is {layers!r:.100}", where=folder / ADAPTER_CONFIG, expected="numbers"
            )
        return Targets(
            names=check_pattern(names) if isinstance(names, str) else tuple(names),
            excluded=check_pattern(excluded) if isinstance(excluded, str) else tuple(excluded),
            layers=(layers,) if isinstance(layers, int) else tuple(layers) if layers else None,
        )
    if names is None:
        return None
    raise ModelError(f"target_modules is {names!r}", where=folder / ADAPTER_CONFIG, expected=_NAMES)


def _are_names(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)


def _is_layer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_named(adapter: LoraAdapter, weights: Path) -> None:
    targets = adapter.targets
    if targets is None or isinstance(targets.names, str):
        return
    absent = [name for name in targets.names if not any(f".{path}".endswith(f".{name}") for path in adapter.modules)]
    if absent:
        raise ModelError(
            f"the adapter is not complete: it names {', '.join(absent[:5])} and holds nothing for them",
            where=weights,
            expected="tensors for every entry of target_modules",
        )
    stray = [path for path in adapter.modules if not targets.of([path])]
    if stray:
        raise ModelError(
            f"the adapter holds tensors of modules that it does not name: {', '.join(stray[:5])}", where=weights
        )


def _provenance(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """What the base was: by the run's manifest if the folder is a run's, else by the configuration."""
    found: dict[str, Any] = {"method": None, "base_model": config.get("base_model_name_or_path")}
    record = find_file(folder, MANIFEST)
    if record is None:
        return found
    manifest = read_json(record, expected="the manifest of a run")
    try:
        contract = manifest["plan"]["contract"]
        found["method"] = contract["method"]
        found["base_sha256"] = dict(manifest.get("sha256", {}).get("base_shards", {}))
        found["license_class"] = manifest.get("provenance_license_class")
        rows = manifest.get("eval_file")
        found["held_out"] = Path(rows) if rows is not None and Path(rows).is_file() else None
        if contract["method"] == "qlora":
            found["nf4"] = NF4Spec(block_size=contract["block_size"], double_quant=contract["double_quant"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"the run's manifest cannot be read: {error!r}", where=record) from error
    return found
