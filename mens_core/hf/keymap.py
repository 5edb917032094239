"""Tensor names of a known family: what a checkpoint holds, with shapes, and which of it are linear layers.

Names are those of transformers' ``state_dict``. GPT-2's original files leave out the ``transformer.`` prefix;
``canonical_name`` puts it back. GPT-2 stores its linears as Conv1D, (in, out); all others as (out, in).
"""

from __future__ import annotations

from mens_core.errors import ModelError
from mens_core.hf.layout import FAMILIES, Layout

__all__ = ["canonical_name", "linear_shapes", "tensor_shapes"]


def canonical_name(layout: Layout, name: str) -> str:
    """The name transformers gives a tensor that a checkpoint stores as ``name``."""
    if layout.family == "gpt2" and not name.startswith(("transformer.", "lm_head.")):
        return f"transformer.{name}"
    return name


def linear_shapes(layout: Layout) -> dict[str, tuple[int, int]]:
    """Module path → (out, in) of every linear layer inside the decoder blocks, in order; the head is not one.

    Raises:
        ModelError: if the core does not know the family.
    """
    width, inner = layout.hidden_size, layout.intermediate_size
    query, key = layout.num_heads * layout.head_dim, layout.num_kv_heads * layout.head_dim
    if layout.family == "gpt2":
        block = {
            "attn.c_attn": (3 * width, width),
            "attn.c_proj": (width, width),
            "mlp.c_fc": (inner, width),
            "mlp.c_proj": (width, inner),
        }
    else:
        block = {
            "self_attn.q_proj": (query, width),
            "self_attn.k_proj": (key, width),
            "self_attn.v_proj": (key, width),
            "self_attn.o_proj": (width, query),
            "mlp.gate_proj": (inner, width),
            "mlp.up_proj": (inner, width),
            "mlp.down_proj": (width, inner),
        }
    stem = _block_stem(layout)
    return {f"{stem}.{n}.{name}": shape for n in range(layout.num_layers) for name, shape in block.items()}


def tensor_shapes(layout: Layout) -> dict[str, tuple[int, ...]]:
    """Canonical tensor name → shape as stored, for every tensor of the model; a tied head is left out.

    Raises:
        ModelError: if the core does not know the family.
    """
    width, vocab, stem = layout.hidden_size, layout.vocab_size, _block_stem(layout)
    gpt2 = layout.family == "gpt2"
    shapes: dict[str, tuple[int, ...]] = {}
    if gpt2:
        shapes |= {
            "transformer.wte.weight": (vocab, width),
            "transformer.wpe.weight": (layout.max_positions, width),
        }
    else:
        shapes["model.embed_tokens.weight"] = (vocab, width)
    for module, (out, into) in linear_shapes(layout).items():
        shapes[f"{module}.weight"] = (into, out) if gpt2 else (out, into)
        if _has_bias(layout, module):
            shapes[f"{module}.bias"] = (out,)
    norms = ("ln_1", "ln_2") if gpt2 else ("input_layernorm", "post_attention_layernorm")
    for n in range(layout.num_layers):
        for norm in norms:
            shapes[f"{stem}.{n}.{norm}.weight"] = (width,)
            if gpt2:
                shapes[f"{stem}.{n}.{norm}.bias"] = (width,)
        if layout.family == "qwen3":
            shapes[f"{stem}.{n}.self_attn.q_norm.weight"] = (layout.head_dim,)
            shapes[f"{stem}.{n}.self_attn.k_norm.weight"] = (layout.head_dim,)
    if gpt2:
        shapes |= {"transformer.ln_f.weight": (width,), "transformer.ln_f.bias": (width,)}
    else:
        shapes["model.norm.weight"] = (width,)
    if not layout.tied:
        shapes["lm_head.weight"] = (vocab, width)
    return shapes


def _block_stem(layout: Layout) -> str:
    if layout.family is None:
        raise ModelError(
            f"the tensor names of model_type {layout.model_type!r} are not known",
            expected=f"one of {', '.join(FAMILIES)}",
        )
    return "transformer.h" if layout.family == "gpt2" else "model.layers"


def _has_bias(layout: Layout, module: str) -> bool:
    if layout.family == "gpt2":
        return True
    if "self_attn" in module:
        return layout.output_bias if module.endswith("o_proj") else layout.attention_bias
    return layout.mlp_bias
