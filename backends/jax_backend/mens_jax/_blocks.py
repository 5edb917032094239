"""The parts of the decoder, as flax modules whose attributes are named as in the checkpoint.

::

    gpt2     h + attn(ln_1(h)),  then  h + mlp(ln_2(h));  learned positions
    others   h + self_attn(input_layernorm(h)),  then  h + mlp(post_attention_layernorm(h));  rotary positions

A decoder holds its blocks as one block whose arrays carry one more axis, the layers, in front; ``scan_blocks``
runs it. Shape letters: T tokens, D width, H query heads, K key/value heads, E head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import attrs
import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from mens_jax import _families
from mens_jax.lora import LoraLinear
from mens_jax.quant import NF4Weight

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mens_core.hf.layout import Layout

__all__ = ["Attend", "Embedding", "Gpt2Decoder", "LlamaDecoder", "Parts", "scan_blocks"]

Attend: TypeAlias = Callable[[Array, Array, Array, float, "Array | None"], Array]
"""(query (T, H, E), key (T, K, E), value (T, K, E), scale, window) to (T, H, E)."""

Rotary: TypeAlias = tuple[Array, Array]
"""Cosines and sines of each position's angles, (T, 1, E), in the base's format."""


class Conv1D(LoraLinear):
    """GPT-2's linear, which stores its weight as (in, out)."""

    transposed = True


class Embedding(nnx.Module):
    """Rows of a table, (V, D)."""

    def __init__(self, weight: Array) -> None:
        self.weight = nnx.Param(weight)

    def __call__(self, index: Array) -> Array:
        """(T,) to (T, D)."""
        return self.weight.get_value()[index]


class RMSNorm(nnx.Module):
    """x / rms(x) · weight, the quotient in float32 (Zhang & Sennrich 2019)."""

    def __init__(self, weight: Array, epsilon: float) -> None:
        self.weight, self.epsilon = nnx.Param(weight), epsilon

    def __call__(self, x: Array) -> Array:
        """Over the last axis."""
        wide = x.astype(jnp.float32)
        wide = wide * lax.rsqrt((wide * wide).mean(axis=-1, keepdims=True) + self.epsilon)
        return self.weight.get_value() * wide.astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x - mean) / deviation · weight + bias, in float32 (Ba et al. 2016)."""

    def __init__(self, weight: Array, bias: Array, epsilon: float) -> None:
        self.weight, self.bias, self.epsilon = nnx.Param(weight), nnx.Param(bias), epsilon

    def __call__(self, x: Array) -> Array:
        """Over the last axis."""
        wide = x.astype(jnp.float32)
        wide = wide - wide.mean(axis=-1, keepdims=True)
        wide = wide * lax.rsqrt((wide * wide).mean(axis=-1, keepdims=True) + self.epsilon)
        return (wide * self.weight.get_value() + self.bias.get_value()).astype(x.dtype)


class Gpt2Attention(nnx.Module):
    """Query, key and value out of one linear, one head width each."""

    def __init__(self, parts: Parts, path: str) -> None:
        self.c_attn, self.c_proj = parts.linear(f"{path}.c_attn"), parts.linear(f"{path}.c_proj")
        self.head_dim, (self.scale, factors) = parts.layout.head_dim, _families.attention_scales(parts.layout)
        self.layer_factor = None if factors is None else nnx.Variable(jnp.asarray(factors))

    def __call__(self, x: Array, rotary: Rotary | None, attend: Attend) -> Array:
        """(T, D) to (T, D)."""
        del rotary
        query, key, value = self.c_attn(x).reshape(x.shape[0], 3, -1, self.head_dim).transpose(1, 0, 2, 3)
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
        return self.c_proj(_families.ACTIVATIONS[self.activation](self.c_fc(x)))


class LlamaMlp(nnx.Module):
    """down_proj(act(gate_proj(x)) · up_proj(x)), SwiGLU where the activation is silu (Shazeer 2020)."""

    def __init__(self, parts: Parts, path: str) -> None:
        self.gate_proj, self.up_proj = parts.linear(f"{path}.gate_proj"), parts.linear(f"{path}.up_proj")
        self.down_proj, self.activation = parts.linear(f"{path}.down_proj"), _families.activation(parts.layout)

    def __call__(self, x: Array) -> Array:
        """(T, D) to (T, D)."""
        return self.down_proj(_families.ACTIVATIONS[self.activation](self.gate_proj(x)) * self.up_proj(x))


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


@attrs.frozen(kw_only=True)
class Parts:
    """Makes the smallest modules from what was loaded.

    Attributes:
        layout: of the model.
        base: stacked name → weight, from ``weights.load_base``.
        ranks: stacked module path → rank of its adapter; absent for none.
        scale: s of the adapter.
    """

    layout: Layout
    base: Mapping[str, Array | NF4Weight]
    ranks: Mapping[str, int]
    scale: float

    def linear(self, path: str) -> LoraLinear:
        """The stacked linear at a path, with its adapter."""
        weight, bias = self.base[f"{path}.weight"], self._dense_or_none(f"{path}.bias")
        # NF4 is stored in (out, in) for every family.
        dense_conv1d = self.layout.family == "gpt2" and not isinstance(weight, NF4Weight)
        kind = Conv1D if dense_conv1d else LoraLinear
        return kind(weight, bias, self.ranks.get(path, 0), self.scale)

    def embedding(self, path: str) -> Embedding:
        """The table at a path."""
        return Embedding(self._dense(f"{path}.weight"))

    def rms_norm(self, path: str) -> RMSNorm:
        """The norm at a path."""
        return RMSNorm(self._dense(f"{path}.weight"), self.layout.norm_eps)

    def layer_norm(self, path: str) -> LayerNorm:
        """The norm at a path."""
        return LayerNorm(self._dense(f"{path}.weight"), self._dense(f"{path}.bias"), self.layout.norm_eps)

    def _dense(self, name: str) -> Array:
        return cast("Array", self.base[name])

    def _dense_or_none(self, name: str) -> Array | None:
        return cast("Array | None", self.base.get(name))


def scan_blocks(
    blocks: nnx.Module, hidden: Array, run: Callable[[Any, Array, Any], tuple[Array, Any]], along: Any = None
) -> tuple[Array, Any]:
    """Pass hidden states through stacked blocks, one layer at a time, compiled once for all of them.

    In the backward pass each layer is computed again, so only the hidden states between layers are kept.

    Args:
        blocks: one block whose arrays have the layers in front.
        hidden: (T, D).
        run: (block of one layer, hidden, that layer's part of ``along``) to (hidden, result of the layer).
        along: arrays with the layers in front.

    Returns:
        (hidden, the layers' results stacked).
    """
    graph, weights = nnx.split(blocks)

    def layer(hidden: Array, parts: tuple[Any, Any]) -> tuple[Array, Any]:
        return run(nnx.merge(graph, parts[0]), hidden, parts[1])

    # Inside a scan XLA cannot merge the two computations, so the guard against it would only cost.
    return lax.scan(jax.checkpoint(layer, prevent_cse=False), hidden, (weights, along))


def _rotate(x: Array, rotary: Rotary) -> Array:
    """Turn each pair (e, e + E/2) of a head by its position's angle; (T, heads, E)."""
    cosine, sine = rotary
    left, right = jnp.split(x, 2, axis=-1)
    return x * cosine + jnp.concatenate([-right, left], axis=-1) * sine
