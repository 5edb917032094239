"""GPT-2 and the Llama family (Llama, Qwen2, Qwen3) as chains of ``layers``.

::

    gpt2     h + attn(ln_1(h)),  then  h + mlp(ln_2(h));  learned positions
    others   h + self_attn(input_layernorm(h)),  then  h + mlp(post_attention_layernorm(h));  rotary positions
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import attrs
import numpy as np

from mens_core import Batch
from mens_core.hf.layout import Layout
from mens_numpy.layers import (
    Answer,
    Layer,
    Linear,
    attention,
    chain,
    gelu,
    heads_of,
    layer_norm,
    residual,
    rms_norm,
    rotate,
    silu,
)
from mens_numpy.weights import Array

__all__ = ["Decoder"]


@attrs.frozen(eq=False)
class Decoder:
    """The base with its adapter.

    Attributes:
        layout: the numbers of the graph.
        base: name → frozen array, see ``weights.read_base``.
        linears: module path → linear layer.
    """

    layout: Layout
    base: Mapping[str, Array]
    linears: Mapping[str, Linear]

    @property
    def head(self) -> Array:
        """(V, D)."""
        return self.base["lm_head.weight"]

    def hidden(self, batch: Batch) -> Answer:
        """Hidden states (T, D) that the head reads, and the pull through all blocks; nothing below is trained."""
        layers = range(self.layout.num_layers)
        if self.layout.family == "gpt2":
            table, places = self.base["transformer.wte.weight"], self.base["transformer.wpe.weight"]
            embedded = table[batch.input_ids] + places[batch.positions]
            halves = [half for n in layers for half in self._gpt2_block(f"transformer.h.{n}", batch)]
            return chain(embedded, [*halves, self._norm("transformer.ln_f")])
        embedded = self.base["model.embed_tokens.weight"][batch.input_ids]
        halves = [half for n in layers for half in self._llama_block(f"model.layers.{n}", batch)]
        return chain(embedded, [*halves, self._norm("model.norm")])

    def _gpt2_block(self, path: str, batch: Batch) -> tuple[Layer, Layer]:
        widen, narrow = self.linears[f"{path}.mlp.c_fc"], self.linears[f"{path}.mlp.c_proj"]
        return (
            partial(residual, [self._norm(f"{path}.ln_1"), partial(self._gpt2_attention, f"{path}.attn", batch)]),
            partial(residual, [self._norm(f"{path}.ln_2"), widen, gelu, narrow]),
        )

    def _llama_block(self, path: str, batch: Batch) -> tuple[Layer, Layer]:
        attend, mlp = partial(self._attention, f"{path}.self_attn", batch), partial(self._mlp, f"{path}.mlp")
        return (
            partial(residual, [self._norm(f"{path}.input_layernorm"), attend]),
            partial(residual, [self._norm(f"{path}.post_attention_layernorm"), mlp]),
        )

    def _norm(self, path: str) -> Layer:
        weight, bias = self.base[f"{path}.weight"], self.base.get(f"{path}.bias")
        if bias is None:
            return partial(rms_norm, weight, self.layout.norm_eps)
        return partial(layer_norm, weight, bias, self.layout.norm_eps)

    def _gpt2_attention(self, path: str, batch: Batch, x: Array) -> Answer:
        """Query, key and value out of one linear."""
        joined, pull_in = self.linears[f"{path}.c_attn"](x)
        query, key, value = (part.reshape(len(x), -1, self.layout.head_dim) for part in np.split(joined, 3, axis=-1))
        mixed, pull_heads = attention(query, key, value, batch.row_lengths.tolist())
        y, pull_out = self.linears[f"{path}.c_proj"](mixed.reshape(len(x), -1))

        def pull(dy: Array) -> Array:
            slopes = pull_heads(pull_out(dy).reshape(mixed.shape))
            return pull_in(np.concatenate([slope.reshape(len(x), -1) for slope in slopes], axis=-1))

        return y, pull

    def _attention(self, path: str, batch: Batch, x: Array) -> Answer:
        """Grouped-query attention with rotary positions; Qwen3 normalises query and key heads before."""
        split, turn = partial(heads_of, self.layout.head_dim), partial(rotate, *self._angles(batch))
        linear = {name: self.linears[f"{path}.{name}_proj"] for name in ("q", "k", "v", "o")}
        normed = self.layout.family == "qwen3"
        q_norm, k_norm = ([self._norm(f"{path}.{name}_norm")] if normed else [] for name in ("q", "k"))
        query, pull_query = chain(x, [linear["q"], split, *q_norm, turn])
        key, pull_key = chain(x, [linear["k"], split, *k_norm, turn])
        value, pull_value = chain(x, [linear["v"], split])
        mixed, pull_heads = attention(query, key, value, batch.row_lengths.tolist())
        y, pull_out = linear["o"](mixed.reshape(len(x), -1))

        def pull(dy: Array) -> Array:
            d_query, d_key, d_value = pull_heads(pull_out(dy).reshape(mixed.shape))
            return pull_query(d_query) + pull_key(d_key) + pull_value(d_value)

        return y, pull

    def _angles(self, batch: Batch) -> tuple[Array, Array]:
        """Cosines and sines, (T, 1, E), of the angles by which a position turns each pair."""
        width = self.layout.head_dim
        speeds = float(self.layout.rope["rope_theta"]) ** (-np.arange(0, width, 2) / width)
        angles = np.tile(batch.positions[:, None] * speeds, 2)[:, None]
        return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)

    def _mlp(self, path: str, x: Array) -> Answer:
        """down_proj(silu(gate_proj(x)) · up_proj(x)) (Shazeer 2020)."""
        gate, pull_gate = chain(x, [self.linears[f"{path}.gate_proj"], silu])
        up, pull_up = self.linears[f"{path}.up_proj"](x)
        y, pull_down = self.linears[f"{path}.down_proj"](gate * up)

        def pull(dy: Array) -> Array:
            slope = pull_down(dy)
            return pull_gate(slope * up) + pull_up(slope * gate)

        return y, pull
