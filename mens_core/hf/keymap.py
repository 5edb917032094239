"""Tensor names of a known family: what a checkpoint holds, with shapes, and which of it are linear layers.

Names are those of the ``state_dict`` of the class that transformers' AutoModelForCausalLM takes. Some checkpoints
use others: GPT-2's original files leave out the ``transformer.`` prefix, Qwen3.5's multimodal ones say
``model.language_model.``; ``canonical_name`` undoes that. GPT-2 stores its linears as Conv1D, (in, out); all
others as (out, in).
"""

from __future__ import annotations

from mens_core.errors import ModelError
from mens_core.hf.families import LINEAR_ATTENTION, REGISTRY, Family
from mens_core.hf.layout import FAMILIES, Layout

__all__ = ["canonical_name", "family_of", "linear_shapes", "tensor_shapes"]

_NESTED = "model.language_model."


def family_of(layout: Layout) -> Family:
    """The table's row for a layout.

    Raises:
        ModelError: if the core does not know the family.
    """
    if layout.family is None:
        raise ModelError(
            f"the tensor names of model_type {layout.model_type!r} are not known",
            expected=f"one of {', '.join(FAMILIES)}",
            fix="the torch backend can still train what transformers' AutoModelForCausalLM knows, "
            "without the inventory of keys",
        )
    return REGISTRY[layout.family]


def canonical_name(layout: Layout, name: str) -> str:
    """The name transformers gives a tensor that a checkpoint stores as ``name``."""
    if layout.family == "gpt2" and not name.startswith(("transformer.", "lm_head.")):
        return f"transformer.{name}"
    if layout.linear is not None and name.startswith(_NESTED):
        return f"model.{name.removeprefix(_NESTED)}"
    return name


def linear_shapes(layout: Layout) -> dict[str, tuple[int, int]]:
    """Module path → (out, in) of every linear layer inside the decoder blocks, in order; the head is not one.

    Raises:
        ModelError: if the core does not know the family.
    """
    family, sizes = family_of(layout), _linear_sizes(layout)
    return {
        f"{family.stem}.{n}.{module}": sizes[module]
        for n, kind in enumerate(layout.layer_types)
        for module in (*(LINEAR_ATTENTION if kind == "linear_attention" else family.attention), *family.mlp)
    }


def tensor_shapes(layout: Layout) -> dict[str, tuple[int, ...]]:
    """Canonical tensor name → shape as stored, for every tensor of the model; a tied head is left out.

    Raises:
        ModelError: if the core does not know the family.
    """
    family, width, vocab = family_of(layout), layout.hidden_size, layout.vocab_size
    shapes: dict[str, tuple[int, ...]] = {}
    if layout.family == "gpt2":
        shapes["transformer.wte.weight"] = (vocab, width)
        shapes["transformer.wpe.weight"] = (layout.max_positions, width)
    else:
        shapes["model.embed_tokens.weight"] = (vocab, width)
    for module, (out, into) in linear_shapes(layout).items():
        shapes[f"{module}.weight"] = (into, out) if family.conv1d else (out, into)
        if _has_bias(layout, module):
            shapes[f"{module}.bias"] = (out,)
    for n, kind in enumerate(layout.layer_types):
        others = _norm_shapes(layout, family.norms)
        others |= _linear_attention_shapes(layout) if kind == "linear_attention" else _head_norm_shapes(layout)
        shapes |= {f"{family.stem}.{n}.{name}": shape for name, shape in others.items()}
    final = "transformer.ln_f" if layout.family == "gpt2" else "model.norm"
    shapes |= _norm_shapes(layout, (final,))
    if not layout.tied:
        shapes["lm_head.weight"] = (vocab, width)
    return shapes


def _linear_sizes(layout: Layout) -> dict[str, tuple[int, int]]:
    """Name within a block → (out, in), for the linear layers of all families."""
    width, inner = layout.hidden_size, layout.intermediate_size
    query, key = layout.num_heads * layout.head_dim, layout.num_kv_heads * layout.head_dim
    sizes = {
        "attn.c_attn": (3 * width, width),
        "attn.c_proj": (width, width),
        "mlp.c_fc": (inner, width),
        "mlp.c_proj": (width, inner),
        "self_attn.q_proj": (2 * query if family_of(layout).gated_query else query, width),
        "self_attn.k_proj": (key, width),
        "self_attn.v_proj": (key, width),
        "self_attn.qkv_proj": (query + 2 * key, width),
        "self_attn.o_proj": (width, query),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.gate_up_proj": (2 * inner, width),
        "mlp.down_proj": (width, inner),
    }
    if layout.linear is None:
        return sizes
    linear = layout.linear
    keys, values = linear.key_heads * linear.key_head_dim, linear.value_heads * linear.value_head_dim
    return sizes | {
        "linear_attn.in_proj_qkv": (2 * keys + values, width),
        "linear_attn.in_proj_z": (values, width),
        "linear_attn.in_proj_a": (linear.value_heads, width),
        "linear_attn.in_proj_b": (linear.value_heads, width),
        "linear_attn.out_proj": (width, values),
    }


def _norm_shapes(layout: Layout, norms: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    parts = ("weight", "bias") if family_of(layout).norm_bias else ("weight",)
    return {f"{norm}.{part}": (layout.hidden_size,) for norm in norms for part in parts}


def _head_norm_shapes(layout: Layout) -> dict[str, tuple[int, ...]]:
    names = ("self_attn.q_norm.weight", "self_attn.k_norm.weight") if family_of(layout).head_norms else ()
    return dict.fromkeys(names, (layout.head_dim,))


def _linear_attention_shapes(layout: Layout) -> dict[str, tuple[int, ...]]:
    """What a linear attention has beside its linear layers."""
    linear = layout.linear
    assert linear is not None, "a layout with such layers has their numbers"
    mixed, _ = _linear_sizes(layout)["linear_attn.in_proj_qkv"]
    return {
        "linear_attn.conv1d.weight": (mixed, 1, linear.conv_kernel),
        "linear_attn.dt_bias": (linear.value_heads,),
        "linear_attn.A_log": (linear.value_heads,),
        "linear_attn.norm.weight": (linear.value_head_dim,),
    }


def _has_bias(layout: Layout, module: str) -> bool:
    if "linear_attn." in module:
        return False
    if "attn." in module:
        return layout.output_bias if module.endswith("o_proj") else layout.attention_bias
    return layout.mlp_bias
