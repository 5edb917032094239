"""Names of the inventory: which weights a model folder should hold for each decoder block, in the runbook's spelling.

An inventory counts weights, not biases, and has no final norm, no head, and no norms of query and key heads.
GPT-2's names have no ``transformer.``; Qwen3.5's multimodal folders have ``model.language_model.layers``. Names as
stored are brought to that spelling by ``inventory_names``, whichever of the two a checkpoint uses.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence

from mens_core.hf.families import LINEAR_ATTENTION
from mens_core.hf.keymap import canonical_name, family_of
from mens_core.hf.layout import Layout

__all__ = [
    "filter_keys_in_shard",
    "inventory_names",
    "layer_attention_weight_keys",
    "layer_mlp_weight_keys",
    "layer_norm_weight_keys",
    "layer_rope_weight_keys",
    "middle_block_projection_key",
    "missing_middle_keys_report",
    "ordered_full_block_weight_keys",
    "ordered_full_block_weight_keys_strict_preflight",
    "ordered_middle_projection_keys",
    "sample_present_keys_sorted_from_present",
]

_LINEAR_ATTENTION_WEIGHTS = (
    *(f"{module}.weight" for module in LINEAR_ATTENTION),
    "linear_attn.conv1d.weight",
    "linear_attn.dt_bias",
    "linear_attn.A_log",
    "linear_attn.norm.weight",
)


def middle_block_projection_key(layout: Layout, layer: int) -> str:
    """The output projection of a layer's attention.

    Raises:
        ModelError: if the core does not know the family, here and in every function below that takes a layout.
    """
    attention = LINEAR_ATTENTION if _is_linear(layout, layer) else family_of(layout).attention
    return _named(layout, layer, [f"{attention[-1]}.weight"])[0]


def layer_attention_weight_keys(layout: Layout, layer: int) -> tuple[str, ...]:
    """The weights of a layer's attention."""
    full = [f"{module}.weight" for module in family_of(layout).attention]
    return _named(layout, layer, _LINEAR_ATTENTION_WEIGHTS if _is_linear(layout, layer) else full)


def layer_mlp_weight_keys(layout: Layout, layer: int) -> tuple[str, ...]:
    """The weights of a layer's feed-forward part."""
    return _named(layout, layer, [f"{module}.weight" for module in family_of(layout).mlp])


def layer_rope_weight_keys(layout: Layout, layer: int) -> tuple[str, ...]:
    """The table of rotary frequencies that some old checkpoints store in every layer; it can be computed."""
    if not family_of(layout).rotary:
        return ()
    attention = "linear_attn" if _is_linear(layout, layer) else "self_attn"
    return _named(layout, layer, [f"{attention}.rotary_emb.inv_freq"])


def layer_norm_weight_keys(layout: Layout, layer: int) -> tuple[str, ...]:
    """The norms of a layer over its whole width."""
    family = family_of(layout)
    parts = ("weight", "bias") if family.norm_bias else ("weight",)
    return _named(layout, layer, [f"{norm}.{part}" for norm in family.norms for part in parts])


def ordered_full_block_weight_keys(layout: Layout) -> tuple[str, ...]:
    """All names of all layers: of each layer attention, feed-forward, rotary table, norms."""
    groups = (layer_attention_weight_keys, layer_mlp_weight_keys, layer_rope_weight_keys, layer_norm_weight_keys)
    return tuple(key for n in range(layout.num_layers) for group in groups for key in group(layout, n))


def ordered_full_block_weight_keys_strict_preflight(layout: Layout) -> tuple[str, ...]:
    """The same without rotary tables, which no checkpoint of today stores."""
    return tuple(key for key in ordered_full_block_weight_keys(layout) if not key.endswith(".inv_freq"))


def ordered_middle_projection_keys(layout: Layout) -> tuple[str, ...]:
    """The attention's output projection of every layer, first layer first."""
    return tuple(middle_block_projection_key(layout, n) for n in range(layout.num_layers))


def inventory_names(layout: Layout, names: Iterable[str]) -> frozenset[str]:
    """Names as stored, those of blocks in the inventory's spelling."""
    family = family_of(layout)
    stem, namespace = f"{family.stem}.", f"{family.namespace}."
    canonical = ((name, canonical_name(layout, name)) for name in names)
    return frozenset(
        namespace + known.removeprefix(stem) if known.startswith(stem) else name for name, known in canonical
    )


def filter_keys_in_shard(keys: Iterable[str], present: Container[str]) -> tuple[str, ...]:
    """Those of the keys that are present, in the keys' order."""
    return tuple(key for key in keys if key in present)


def sample_present_keys_sorted_from_present(present: Iterable[str], most: int = 24) -> tuple[str, ...]:
    """The first names that are present, in alphabetical order, for a message."""
    return tuple(sorted(present)[:most])


def missing_middle_keys_report(layout: Layout, present: Iterable[str], most: int = 32) -> tuple[str, ...]:
    """The attention output projections that are not there, first layer first.

    Args:
        layout: what config.json asks for.
        present: names as stored.
        most: how many to tell; at least one is told.
    """
    stored = inventory_names(layout, present)
    missing = [key for key in ordered_middle_projection_keys(layout) if key not in stored]
    return tuple(missing[: max(1, most)])


def _is_linear(layout: Layout, layer: int) -> bool:
    return layout.layer_types[layer] == "linear_attention"


def _named(layout: Layout, layer: int, names: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{layout.namespace_prefix}.{layer}.{name}" for name in names)
