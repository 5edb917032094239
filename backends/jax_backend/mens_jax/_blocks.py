"""The decoder's blocks, as flax modules whose attributes are named as in the checkpoint.

::

    gpt2     h + attn(ln_1(h)),  then  h + mlp(ln_2(h));  learned positions
    others   h + self_attn(input_layernorm(h)),  then  h + mlp(post_attention_layernorm(h));  rotary positions

A decoder holds its blocks as one block whose arrays carry one more axis, the layers, in front; ``scan_blocks``
runs it. Shape letters: T tokens, D width, H query heads, K key/value heads, E head width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from mens_jax import _families
from mens_jax._arrays import KEPT
from mens_jax._parts import Embedding, Parts
from mens_jax._sizes import has_room
from mens_jax.lora import LoraLinear

__all__ = ["Attend", "Gpt2Decoder", "LlamaDecoder", "Parts", "scan_blocks"]

Attend: TypeAlias = Callable[[Array, Array, Array, float, "Array | None"], Array]
"""(query (T, H, E), key (T, K, E), value (T, K, E), scale, window) to (T, H, E)."""

Rotary: TypeAlias = tuple[Array, Array]
"""Cosines and sines of each position's angles, (T, 1, E), in the base's format."""

_tanh_gelu = functools.partial(jax.nn.gelu, approximate=True)
_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
}


class Gpt2Attention(nnx.Module):
    """Query, key and value out of one linear, one head width each."""

    def __init__(self, parts: Parts, path: str) -> None:
        self.c_attn, self.c_proj = parts.linear(f"{path}.c_attn"), parts.linear(f"{path}.c_proj")
        self.head_dim, (self.scale, factors) = parts.layout.head_dim, _families.attention_scales(parts.layout)
        self.layer_factor = None if factors is None else nnx.Variable(jnp.asarray(factors))

    def __call__(self, x: Array, rotary: Rotary | None, attend: Attend) -> Array:
        """(T, D) to (T, D)."""
        del rotary
        parts = jnp.split(self.c_attn(x), 3, axis=-1)
        query, key, value = (part.reshape(x.shape[0], -1, self.head_dim) for part in parts)
        if self.layer_factor is not None:
            query = query * self.layer_factor.get_value().astype(query.dtype)
        return self.c_proj(attend(query, key, value, self.scale, None).reshape(x.shape))


class LlamaAttention(nnx.Module):
    """Grouped-query attention with rotary positions; Qwen3 normalises query and key heads as well."""

    def __init__(self, parts: Parts, path: str) -> None:
        self.q_proj, self.k_proj = parts.linear(f"{path}.q_proj"), parts.linear(f"{path}.k_proj")
        self.v_proj, self.o_proj = parts.linear(f"{path}.v_proj"), parts.linear(f"{path}.o_proj")
        normed = parts.layout.family == "qwen3"
        self.q_norm = parts.rms_norm(f"{path}.q_norm") if normed else None
        self.k_norm = parts.rms_norm(f"{path}.k_norm") if normed else None
        self.head_dim, (self.scale, _) = parts.layout.head_dim, _families.attention_scales(parts.layout)
        windows = _families.windows(parts.layout)
        self.window = None if windows is None else nnx.Variable(jnp.asarray(windows))

    def __call__(self, x: Array, rotary: Rotary | None, attend: Attend) -> Array:
        """(T, D) to (T, D)."""
        query, key, value = (
            part(x).reshape(x.shape[0], -1, self.head_dim) for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        if rotary is not None:
            query, key = _rotate(query, rotary), _rotate(key, rotary)
        window = None if self.window is None else self.window.get_value()
        return self.o_proj(attend(query, key, value, self.scale, window).reshape(x.shape[0], -1))


class Gpt2Mlp(nnx.Module):
    """c_proj(act(c_fc(x)))."""

    def __init__(self, parts: Parts, path: str) -> None:
        self.c_fc, self.c_proj = parts.linear(f"{path}.c_fc"), parts.linear(f"{path}.c_proj")
        self.activation = _families.activation(parts.layout)

    def __call__(self, x: Array) -> Array:
        """(T, D) to (T, D)."""
        return self.c_proj(_ACTIVATIONS[self.activation](self.c_fc(x)))


class LlamaMlp(nnx.Module):
    """down_proj(act(gate_proj(x)) · up_proj(x)), SwiGLU where the activation is silu (Shazeer 2020)."""

    def __init__(self, parts: Parts, path: str) -> None:
        self.gate_proj, self.up_proj = parts.linear(f"{path}.gate_proj"), parts.linear(f"{path}.up_proj")
        self.down_proj, self.activation = parts.linear(f"{path}.down_proj"), _families.activation(parts.layout)

    def __call__(self, x: Array) -> Array:
        """(T, D) to (T, D)."""
        return self.down_proj(_ACTIVATIONS[self.activation](self.gate_proj(x)) * self.up_proj(x))


class Gpt2Block(nnx.Module):
    """One layer of GPT-2."""

    def __init__(self, parts: Parts, path: str) -> None:
        self.ln_1, self.attn = parts.layer_norm(f"{path}.ln_1"), Gpt2Attention(parts, f"{path}.attn")
        self.ln_2, self.mlp = parts.layer_norm(f"{path}.ln_2"), Gpt2Mlp(parts, f"{path}.mlp")

    def __call__(self, x: Array, rotary: Rotary | None, attend: Attend) -> Array:
        """(T, D) to (T, D)."""
        x = x + self.attn(self.ln_1(x), rotary, attend)
        return x + self.mlp(self.ln_2(x))


class LlamaBlock(nnx.Module):
    """One layer of Llama, Qwen2 or Qwen3."""

    def __init__(self, parts: Parts, path: str) -> None:
        self.input_layernorm = parts.rms_norm(f"{path}.input_layernorm")
        self.self_attn = LlamaAttention(parts, f"{path}.self_attn")
        self.post_attention_layernorm = parts.rms_norm(f"{path}.post_attention_layernorm")
        self.mlp = LlamaMlp(parts, f"{path}.mlp")

    def __call__(self, x: Array, rotary: Rotary | None, attend: Attend) -> Array:
        """(T, D) to (T, D)."""
        x = x + self.self_attn(self.input_layernorm(x), rotary, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Gpt2Decoder(nnx.Module):
    """Learned positions, blocks ``h``, last norm ``ln_f``."""

    def __init__(self, parts: Parts, path: str) -> None:
        self.wte, self.wpe = parts.embedding(f"{path}.wte"), parts.embedding(f"{path}.wpe")
        self.h, self.ln_f = Gpt2Block(parts, f"{path}.h"), parts.layer_norm(f"{path}.ln_f")

    def embed(self, input_ids: Array, positions: Array) -> tuple[Array, Rotary | None]:
        """(T,) and (T,) to hidden states (T, D), and nothing that the blocks need."""
        return self.wte(input_ids) + self.wpe(positions), None

    @property
    def table(self) -> Embedding:
        """The token embedding."""
        return self.wte

    @property
    def blocks(self) -> nnx.Module:
        """The stacked blocks."""
        return self.h

    def norm_out(self, x: Array) -> Array:
        """(T, D) to (T, D)."""
        return self.ln_f(x)


class LlamaDecoder(nnx.Module):
    """Rotary positions, blocks ``layers``, last norm ``norm``."""

    def __init__(self, parts: Parts, path: str) -> None:
        self.embed_tokens, self.norm = parts.embedding(f"{path}.embed_tokens"), parts.rms_norm(f"{path}.norm")
        self.layers = LlamaBlock(parts, f"{path}.layers")
        self.inv_freq = nnx.Variable(jnp.asarray(_families.inverse_frequencies(parts.layout)))

    def embed(self, input_ids: Array, positions: Array) -> tuple[Array, Rotary | None]:
        """(T,) and (T,) to hidden states (T, D) and the rotary tables of the positions."""
        hidden = self.embed_tokens(input_ids)
        angles = positions[:, None].astype(jnp.float32) * self.inv_freq.get_value()
        angles = jnp.concatenate([angles, angles], axis=-1)[:, None]
        return hidden, (jnp.cos(angles).astype(hidden.dtype), jnp.sin(angles).astype(hidden.dtype))

    @property
    def table(self) -> Embedding:
        """The token embedding."""
        return self.embed_tokens

    @property
    def blocks(self) -> nnx.Module:
        """The stacked blocks."""
        return self.layers

    def norm_out(self, x: Array) -> Array:
        """(T, D) to (T, D)."""
        return self.norm(x)


def scan_blocks(
    blocks: nnx.Module,
    hidden: Array,
    run: Callable[[Any, Array, Any], tuple[Array, Any]],
    along: Any = None,
    *,
    checkpointed: bool = False,
) -> tuple[Array, Any]:
    """Pass hidden states through stacked blocks, one layer at a time, compiled once for all of them.

    In the backward pass each layer is computed again from the hidden states before it. Where there is room its
    products are kept instead, and only what is cheap is computed again; an NF4 weight is never kept.

    Args:
        blocks: one block whose arrays have the layers in front.
        hidden: (T, D).
        run: (block of one layer, hidden, that layer's part of ``along``) to (hidden, result of the layer).
        along: arrays with the layers in front.
        checkpointed: whether no product is kept, room or not.

    Returns:
        (hidden, the layers' results stacked).
    """
    graph, weights = nnx.split(blocks)

    def layer(hidden: Array, parts: tuple[Any, Any]) -> tuple[Array, Any]:
        return run(nnx.merge(graph, parts[0]), hidden, parts[1])

    kept = [KEPT] if not checkpointed and _has_room(blocks, hidden) else []
    keep = jax.checkpoint_policies.save_only_these_names(*kept)
    # Inside a scan XLA cannot merge the two computations, so the guard against it would only cost.
    return lax.scan(jax.checkpoint(layer, prevent_cse=False, policy=keep), hidden, (weights, along))


def _has_room(blocks: nnx.Module, hidden: Array) -> bool:
    """Whether the products of all layers may be kept."""
    linears = [module for _, module in nnx.iter_graph(blocks) if isinstance(module, LoraLinear)]
    layers = jax.tree.leaves(nnx.state(blocks))[0].shape[0]
    products = sum(linear.shape[0] for linear in linears) * layers * hidden.size // hidden.shape[1]
    base = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(blocks)))
    return has_room(products * hidden.dtype.itemsize, base)


def _rotate(x: Array, rotary: Rotary) -> Array:
    """Turn each pair (e, e + E/2) of a head by its position's angle; (T, heads, E)."""
    cosine, sine = rotary
    left, right = jnp.split(x, 2, axis=-1)
    return x * cosine + jnp.concatenate([-right, left], axis=-1) * sine
