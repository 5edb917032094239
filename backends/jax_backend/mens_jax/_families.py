"""What config.json asks of a decoder beyond its sizes, and which of it this backend can do; imports no JAX.

Source of every rule: transformers' modeling and configuration files of the four families, version 5.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mens_core.hf.layout import GRAPHS, Layout

__all__ = ["ACTIVATIONS", "activation", "attention_scales", "inverse_frequencies", "obstacle", "windows"]

ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "swish")
_ROPES = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


def activation(layout: Layout) -> str:
    """The name of the feed-forward part's activation."""
    if layout.family == "gpt2":
        return str(layout.config.get("activation_function", "gelu_new"))
    return str(layout.config.get("hidden_act", "silu"))


def attention_scales(layout: Layout) -> tuple[float, NDArray[np.float32] | None]:
    """The factor on the scores, and a further one for each layer, (layers,), where the config asks for it."""
    scale = layout.head_dim**-0.5
    if layout.family != "gpt2":
        return scale, None
    by_layer = layout.config.get("scale_attn_by_inverse_layer_idx", False)
    return (
        scale if layout.config.get("scale_attn_weights", True) else 1.0,
        (1 / np.arange(1, layout.num_layers + 1)).astype(np.float32) if by_layer else None,
    )


def windows(layout: Layout) -> NDArray[np.int32] | None:
    """How many tokens a query sees in each layer, (layers,); None where every layer sees all of them."""
    if not layout.config.get("use_sliding_window", False) or layout.config.get("sliding_window", 4096) is None:
        return None
    sliding = np.asarray([kind == "sliding_attention" for kind in _layer_types(layout)])
    width = layout.config.get("sliding_window", 4096)
    return np.where(sliding, width, np.iinfo(np.int32).max).astype(np.int32) if sliding.any() else None


def inverse_frequencies(layout: Layout) -> NDArray[np.float32]:
    """Radians a position turns each pair of head dimensions by, (E / 2,) float32.

    Sources: Su et al. 2021, RoFormer, section 3.4.3; for ``llama3`` the rule of Llama 3.1's reference code.
    """
    rope, half = layout.rope, np.arange(0, layout.head_dim, 2, dtype=np.float64)
    frequencies = (1.0 / float(rope["rope_theta"]) ** (half / layout.head_dim)).astype(np.float32)
    if rope["rope_type"] == "default":
        return frequencies
    slowed = frequencies / np.float32(rope["factor"])
    if rope["rope_type"] == "linear":
        return slowed
    context = layout.config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    turns = (context or layout.max_positions) * frequencies / np.float32(2 * math.pi)
    share = np.clip((turns - np.float32(low)) / np.float32(high - low), 0, 1)
    return np.asarray((1 - share) * slowed + share * frequencies, np.float32)


def obstacle(layout: Layout) -> str | None:
    """What of this model the backend does not do, in one sentence; None if it does all of it."""
    if layout.family not in GRAPHS:
        known = ", ".join(GRAPHS)
        return f"JAX has no graph for model_type {layout.model_type!r}, only for {known}; the torch backend may have"
    if layout.config.get("quantization_config"):
        return "the base is stored quantised already; give the checkpoint it was made from"
    if activation(layout) not in ACTIVATIONS:
        return f"activation {activation(layout)!r} is not one of {', '.join(ACTIVATIONS)}"
    if layout.family == "gpt2":
        crossed = layout.config.get("add_cross_attention", False)
        return "a GPT-2 with cross-attention is no decoder of its own" if crossed else None
    return _obstacle_in_rope(layout) or _obstacle_in_layers(layout)


def _obstacle_in_rope(layout: Layout) -> str | None:
    rope = layout.rope
    kind = rope["rope_type"]
    if kind not in _ROPES:
        return f"rope_type {kind!r} is not one of {', '.join(_ROPES)}"
    absent = [name for name in ("rope_theta", *_ROPES[kind]) if not _is_positive(rope.get(name))]
    if absent:
        return f"rope_type {kind!r} lacks a usable {', '.join(absent)} in config.json"
    if rope.get("partial_rotary_factor", layout.config.get("partial_rotary_factor", 1.0)) != 1.0:
        return "partial_rotary_factor is not 1, and only whole heads are rotated here"
    return f"head_dim {layout.head_dim} is odd, so it has no rotary pairs" if layout.head_dim % 2 else None


def _obstacle_in_layers(layout: Layout) -> str | None:
    kinds = _layer_types(layout)
    if len(kinds) != layout.num_layers or not set(kinds) <= {"full_attention", "sliding_attention"}:
        return f"layer_types {sorted(set(kinds))} of {len(kinds)} layers: only full and sliding attention are known"
    return None


def _layer_types(layout: Layout) -> list[str]:
    given = layout.config.get("layer_types")
    if given is not None:
        return list(given)
    first = layout.config.get("max_window_layers", 28) if layout.config.get("use_sliding_window", False) else None
    full = layout.num_layers if first is None else min(first, layout.num_layers)
    return ["full_attention"] * full + ["sliding_attention"] * (layout.num_layers - full)


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
