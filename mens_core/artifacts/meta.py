"""Adapters of the older system: one safetensors file and a description, version 2 or 3.

    v2   format vox_mens_qlora_lora_only_v2 or vox_populi_qlora_lora_only_v2, version 2
    v3   format vox_mens_adapter or vox_populi_adapter, version 3

``layer_order`` lists logical names, ``base_key_map`` says which tensor of the base each of them updates. Tensors are
called ``<logical>.lora_a`` (R, in) and ``<logical>.lora_b`` (out, R), or the same with ``.weight`` behind, or as PEFT
calls them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from mens_core.artifacts.lora import LoraAdapter, LoraPair
from mens_core.artifacts.peft import PEFT_PREFIX
from mens_core.artifacts.tensors import read_tensors
from mens_core.errors import ModelError
from mens_core.exchange import NF4Spec
from mens_core.hf.files import read_json

__all__ = ["META_WEIGHTS", "V2_META", "Meta", "read_meta", "read_meta_adapter"]

#: What the files are called that ``adapter convert`` writes; the older system takes any name.
META_WEIGHTS = "adapter.safetensors"
V2_META = "adapter_meta_v2.json"

_FORMATS = {
    "vox_mens_qlora_lora_only_v2": 2,
    "vox_populi_qlora_lora_only_v2": 2,
    "vox_mens_adapter": 3,
    "vox_populi_adapter": 3,
}
_EXPECTED = f"version 2 or 3 of an adapter's description, with format {', '.join(_FORMATS)}"
# The ways in which a tensor of a logical name and its base key has been called.
_SPELLINGS = (
    ("{logical}.lora_a", "{logical}.lora_b"),
    ("{logical}.lora_a.weight", "{logical}.lora_b.weight"),
    (f"{PEFT_PREFIX}{{module}}.lora_A.weight", f"{PEFT_PREFIX}{{module}}.lora_B.weight"),
)


@attrs.frozen(kw_only=True)
class Meta:
    """A description, checked.

    Attributes:
        version: 2 or 3.
        method: ``lora`` or ``qlora``.
        keys: logical name → name of the base's tensor, in the order of the layers.
        rank: of every update.
        alpha: the scale is alpha / rank.
        base_model: folder or hub id, or None.
        nf4: how the base was quantised, or None.
        config: the description as it was read.
    """

    version: int
    method: str
    keys: Mapping[str, str]
    rank: int
    alpha: float
    base_model: str | None
    nf4: NF4Spec | None
    config: Mapping[str, Any] = attrs.field(repr=False)


def read_meta(path: Path) -> Meta:
    """Read a description.

    Raises:
        ModelError: if it is neither version, contradicts itself, or maps two layers to one tensor.
    """
    config = read_json(path, expected=_EXPECTED)
    if not isinstance(config, dict):
        raise ModelError("the adapter's description is no JSON object", where=path, expected=_EXPECTED)
    version = _FORMATS.get(str(config.get("format")))
    if version is None or config.get("version") != version:
        raise ModelError(
            f"format {config.get('format')!r} with version {config.get('version')!r} is not known",
            where=path,
            expected=_EXPECTED,
        )
    order: Any = config.get("layer_order")
    keys: Any = config.get("base_key_map")
    if not _are_names(order) or not isinstance(keys, dict) or not _are_names([*keys, *keys.values()]):
        raise ModelError("layer_order is no list of names, or base_key_map no mapping of them", where=path)
    absent = [logical for logical in order if logical not in keys]
    if absent:
        raise ModelError(f"base_key_map has no entry for {', '.join(absent[:5])}", where=path, expected="one a layer")
    users: dict[str, str] = {}
    for logical in order:
        other = users.setdefault(keys[logical], logical)
        if other != logical or order.count(logical) > 1:
            raise ModelError(
                f"{other} and {logical} both update {keys[logical]}", where=path, expected="one layer for each tensor"
            )
    quant = config.get("quant") or {}
    quantised = version == 2 or quant.get("base_quant") == "nf4"
    return Meta(
        version=version,
        method="qlora" if version == 2 else _choice(path, config, "adapter_method", ("lora", "qlora")),
        keys={logical: keys[logical] for logical in order},
        rank=int(_positive(path, config, "rank", whole=True)),
        alpha=_positive(path, config, "alpha", whole=False),
        base_model=config.get("base_model"),
        nf4=NF4Spec(double_quant=bool(quant.get("double_quant", True))) if quantised else None,
        config=config,
    )


def read_meta_adapter(weights: Path, meta_path: Path) -> LoraAdapter:
    """Read an adapter by its description.

    Raises:
        ModelError: as ``read_meta`` does; or if a tensor is missing or left over, or has another rank.
    """
    meta = read_meta(meta_path)
    tensors = dict(read_tensors(weights))
    pairs = {}
    for logical, key in meta.keys.items():
        a, b = _taken(tensors, logical, key, weights)
        if a.ndim != 2 or a.shape[0] != meta.rank:
            raise ModelError(
                f"lora_a of {logical} has shape {a.shape}",
                where=weights,
                expected=f"({meta.rank}, in), as its description says",
            )
        pairs[key] = LoraPair(a=a, b=b, scale=meta.alpha / meta.rank)
    if tensors:
        raise ModelError(
            f"the adapter holds tensors that its description does not name: {', '.join(sorted(tensors)[:5])}",
            where=weights,
            expected="two tensors for each entry of layer_order",
        )
    adapter = LoraAdapter(
        source=weights,
        kind=f"v{meta.version}",
        method=meta.method,
        pairs=pairs,
        base_model=meta.base_model,
        nf4=meta.nf4,
        config=meta.config,
    )
    adapter.check()
    return adapter


def _taken(
    tensors: dict[str, NDArray[Any]], logical: str, key: str, weights: Path
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Both tensors of a layer, taken out of those that are left."""
    module = key.removesuffix(".weight")
    for spelling in _SPELLINGS:
        names = [name.format(logical=logical, module=module) for name in spelling]
        if all(name in tensors for name in names):
            a, b = (np.asarray(tensors.pop(name), np.float32) for name in names)
            return a, b
    raise ModelError(
        f"the adapter has no pair of tensors for {logical}", where=weights, expected=f"{logical}.lora_a and .lora_b"
    )


def _are_names(values: Any) -> bool:
    return isinstance(values, list) and bool(values) and all(isinstance(value, str) and value for value in values)


def _choice(path: Path, config: Mapping[str, Any], name: str, choices: tuple[str, ...]) -> str:
    if config.get(name) not in choices:
        raise ModelError(f"{name} is {config.get(name)!r}", where=path, expected=f"one of {', '.join(choices)}")
    return str(config[name])


def _positive(path: Path, config: Mapping[str, Any], name: str, *, whole: bool) -> float:
    value = config.get(name)
    if not isinstance(value, int if whole else int | float) or isinstance(value, bool) or not value > 0:
        raise ModelError(f"{name} is {value!r}", where=path, expected=f"a positive {'whole ' if whole else ''}number")
    return value
