"""Which tensor of the base each update of an adapter belongs to; whatever does not fit is refused by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from mens_core.artifacts.files import sha256_file
from mens_core.artifacts.lora import LoraAdapter, LoraPair
from mens_core.errors import ModelError
from mens_core.hf.inventory import Inventory
from mens_core.hf.keymap import canonical_name
from mens_core.hf.layout import Layout

__all__ = ["Binding", "bind", "check_base"]

HEAD = "lm_head.weight"
# Tables of tokens, which a tied head is.
_TABLES = ("model.embed_tokens.weight", "transformer.wte.weight")
# Formats of a weight that an update can be added to.
_MERGEABLE = ("F32", "BF16", "F16")
# Linear layers that are stored (in, out): GPT-2's Conv1D.
_CONV1D = (".attn.c_attn.weight", ".attn.c_proj.weight", ".mlp.c_fc.weight", ".mlp.c_proj.weight")
# The first part of a name → the kind of model that names its tensors so, as the older system told them apart.
_KINDS = (
    ("model.language_model.", "qwen3_5"),
    ("transformer.", "gpt2"),
    ("h.", "gpt2"),
    ("wte", "gpt2"),
    ("wpe", "gpt2"),
    ("model.", "llama or qwen"),
)


@attrs.frozen(kw_only=True)
class Binding:
    """Where everything goes.

    Attributes:
        updates: name of a tensor as the base stores it → its update, in the orientation in which it is stored.
        whole: name as stored → what takes its place.
        untied: the tensor that a head of its own is made from, where the base's head is tied to it and the adapter
            changes either by itself; else None.
    """

    updates: Mapping[str, LoraPair] = attrs.field(repr=False)
    whole: Mapping[str, NDArray[Any]] = attrs.field(repr=False)
    untied: str | None


def bind(adapter: LoraAdapter, inventory: Inventory, layout: Layout | None) -> Binding:
    """Find the tensor of every update.

    Args:
        adapter: as read.
        inventory: of the base; of a part of it where the layout is None.
        layout: what the base's config.json says; None where single shards are merged.

    Raises:
        ModelError: if a tensor is missing, claimed twice, of a format that cannot be merged, or of other lengths than
            its update (nothing is broadcast); if names of several families are mixed; if the adapter leaves out
            modules that it says it adapts.
    """
    _check_one_kind([*adapter.pairs, *adapter.whole], adapter.source)
    pairs = _with_own_head(adapter, layout)
    stored = {name: name for name in inventory.tensors}
    if layout is not None:
        stored = {canonical_name(layout, name): name for name in inventory.tensors} | stored
    untied = _tied_to(inventory, layout) if _is_apart(layout, [*pairs, *adapter.whole], adapter.whole) else None
    if untied:
        stored[HEAD] = HEAD
    absent = [name for name in (*pairs, *adapter.whole) if name not in stored]
    if absent:
        raise ModelError(
            f"{len(absent)} of {len(pairs) + len(adapter.whole)} tensors of the adapter have no counterpart in "
            f"the base: {', '.join(absent[:5])}",
            where=f"{adapter.source} onto {inventory.folder}",
            expected="the model that the adapter was trained on, with all shards that hold adapted layers",
        )
    _check_complete(adapter, inventory)
    updates: dict[str, LoraPair] = {}
    for name, pair in pairs.items():
        key = stored[name]
        if key in updates:
            raise ModelError(f"two updates belong to {key}", where=adapter.source, expected="one for each tensor")
        updates[key] = _oriented(pair, key, inventory, head=untied if key == HEAD else None)
    whole = {stored[name]: tensor for name, tensor in adapter.whole.items()}
    for name, tensor in whole.items():
        shape = inventory.tensors[untied if untied and name == HEAD else name].shape
        if tensor.shape != shape:
            raise ModelError(
                f"{name} has shape {tensor.shape} in the adapter and {shape} in the base",
                where=adapter.source,
                expected="a base with the same vocabulary",
            )
    return Binding(updates=updates, whole=whole, untied=untied)


def check_base(adapter: LoraAdapter, files: Iterable[Path], *, changed_anyway: bool) -> str | None:
    """See that the base is the one the adapter was trained on, by the hashes of its weight files.

    Returns:
        What is to be said of it, or None where it is the same.

    Raises:
        ModelError: if a hash differs and that was not allowed.
    """
    known = adapter.base_sha256
    if not known:
        return "the adapter does not say which weights it was trained on"
    found = {path.name: sha256_file(path) for path in files}
    if set(found.values()) <= set(known.values()):
        return None
    changed = sorted(name for name, digest in found.items() if digest not in known.values())
    if not changed_anyway:
        raise ModelError(
            f"the base is not the one that the adapter was trained on: {', '.join(changed[:5])} differs",
            where=adapter.source,
            expected="weight files with the hashes in the run's manifest",
            fix="--base-changed-anyway, if the change is known to be harmless",
        )
    return f"{', '.join(changed[:5])} is not what the adapter was trained on"


def _check_one_kind(names: Iterable[str], source: Path) -> None:
    kinds: dict[str, str] = {}
    for name in names:
        kind = next((kind for start, kind in _KINDS if name.startswith(start)), None)
        if kind is not None:
            kinds.setdefault(kind, name)
    if len(kinds) > 1:
        raise ModelError(
            f"the adapter mixes tensors of different kinds of model: {', '.join(kinds.values())}",
            where=source,
            expected="layers of one model",
        )


def _with_own_head(adapter: LoraAdapter, layout: Layout | None) -> dict[str, LoraPair]:
    """The updates; one that the older system mapped to a tied table is the head's and leaves the table alone."""
    if layout is None or not layout.tied or adapter.kind == "peft":
        return dict(adapter.pairs)
    return {HEAD if canonical_name(layout, name) in _TABLES else name: pair for name, pair in adapter.pairs.items()}


def _check_complete(adapter: LoraAdapter, inventory: Inventory) -> None:
    if adapter.targets is None or not inventory.linears:
        return
    absent = sorted(adapter.targets.of(inventory.linears) - set(adapter.modules))
    if absent:
        raise ModelError(
            f"the adapter is not complete: it holds nothing for {len(absent)} modules that its configuration names, "
            f"such as {', '.join(absent[:3])}",
            where=adapter.source,
            expected="an update for each of them",
        )


def _is_apart(layout: Layout | None, changed: Iterable[str], whole: Iterable[str]) -> bool:
    """Whether a head that is tied is no longer the table of tokens: either was replaced or updated by itself."""
    return HEAD in changed or (layout is not None and any(canonical_name(layout, name) in _TABLES for name in whole))


def _tied_to(inventory: Inventory, layout: Layout | None) -> str | None:
    """The table of tokens that a tied head is, by its name as stored."""
    if layout is None or not layout.tied:
        return None
    return next((name for name in inventory.tensors if canonical_name(layout, name) in _TABLES), None)


def _oriented(pair: LoraPair, key: str, inventory: Inventory, *, head: str | None) -> LoraPair:
    """The update as its tensor is stored: GPT-2 stores linear layers transposed."""
    info = inventory.tensors[head or key]
    if info.dtype not in _MERGEABLE:
        raise ModelError(
            f"{key} is stored as {info.dtype}, to which nothing can be added",
            where=inventory.places[head or key],
            expected=f"{', '.join(_MERGEABLE)}: the model before it was quantised",
        )
    transposed = key.endswith(_CONV1D)
    fits = pair.shape[::-1] if transposed else pair.shape
    if info.shape != fits:
        raise ModelError(
            f"{key} has shape {info.shape}, its update {fits}",
            where=inventory.places[head or key],
            expected="the same shape: nothing is broadcast",
        )
    if not transposed:
        return pair
    return LoraPair(a=np.ascontiguousarray(pair.b.T), b=np.ascontiguousarray(pair.a.T), scale=pair.scale)
