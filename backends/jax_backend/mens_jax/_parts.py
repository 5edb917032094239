"""The smallest modules of the decoder, and how they are made from what was loaded.

Their arrays carry one more axis, the layers, in front where they belong to blocks; they are called on one layer.
Shape letters: V vocabulary, D width, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import attrs
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from mens_core.hf.layout import Layout
from mens_jax.lora import LoraLinear
from mens_jax.quant import NF4Weight

__all__ = ["Conv1D", "Embedding", "LayerNorm", "Parts", "RMSNorm"]


class Conv1D(LoraLinear):
    """GPT-2's linear, which stores its weight as (in, out)."""

    transposed = True


class Embedding(nnx.Module):
    """Rows of a table, (V, D)."""

    def __init__(self, weight: Array) -> None:
        self.weight = nnx.Param(weight)

    def __call__(self, index: Array) -> Array:
        """(T,) to (T, D)."""
        rows: Array = self.weight.get_value()[index]
        return rows


class RMSNorm(nnx.Module):
    """x / rms(x) · weight, the quotient in float32 (Zhang & Sennrich 2019)."""

    def __init__(self, weight: Array, epsilon: float) -> None:
        self.weight, self.epsilon = nnx.Param(weight), epsilon

    def __call__(self, x: Array) -> Array:
        """Over the last axis."""
        wide = x.astype(jnp.float32)
        wide = wide * lax.rsqrt((wide * wide).mean(axis=-1, keepdims=True) + self.epsilon)
        scaled: Array = self.weight.get_value() * wide.astype(x.dtype)
        return scaled


class LayerNorm(nnx.Module):
    """(x - mean) / deviation · weight + bias, in float32 (Ba et al. 2016)."""

    def __init__(self, weight: Array, bias: Array, epsilon: float) -> None:
        self.weight, self.bias, self.epsilon = nnx.Param(weight), nnx.Param(bias), epsilon

    def __call__(self, x: Array) -> Array:
        """Over the last axis."""
        wide = x.astype(jnp.float32)
        wide = wide - wide.mean(axis=-1, keepdims=True)
        wide = wide * lax.rsqrt((wide * wide).mean(axis=-1, keepdims=True) + self.epsilon)
        scaled: Array = wide * self.weight.get_value() + self.bias.get_value()
        return scaled.astype(x.dtype)


@attrs.frozen(kw_only=True)
class Parts:
    """Makes the smallest modules from what was loaded.

    Attributes:
        layout: of the model.
        base: stacked name → weight, from ``weights.load_base``.
        ranks: stacked module path → largest rank of its layers' adapters; absent for none.
        scales: stacked module path → s of the adapter, or of each layer's, (layers,).
    """

    layout: Layout
    base: Mapping[str, Array | NF4Weight]
    ranks: Mapping[str, int]
    scales: Mapping[str, float | Array]

    def linear(self, path: str) -> LoraLinear:
        """The stacked linear at a path, with its adapter."""
        weight, bias = self.base[f"{path}.weight"], self._dense_or_none(f"{path}.bias")
        # NF4 is stored in (out, in) for every family.
        dense_conv1d = self.layout.family == "gpt2" and not isinstance(weight, NF4Weight)
        kind = Conv1D if dense_conv1d else LoraLinear
        return kind(weight, bias, self.ranks.get(path, 0), self.scales.get(path, 0.0))

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
