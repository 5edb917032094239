"""The smallest modules of the decoder, and how they are made from what was loaded.

Their arrays carry one more axis, the layers, in front where they belong to blocks; they are called on one layer.
Shape letters: V vocabulary, D width, T tokens.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import cast

import attrs
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from mens_core.hf.layout import Layout
from mens_core.hf.whole import TABLES, untrained_row
from mens_jax._names import BLOCKS
from mens_jax._whole import Dense
from mens_jax.lora import LoraLinear
from mens_jax.quant import NF4Weight

__all__ = ["Conv1D", "Embedding", "LayerNorm", "Parts", "RMSNorm"]


class Conv1D(LoraLinear):
    """GPT-2's linear, which stores its weight as (in, out)."""

    transposed = True


class Embedding(nnx.Module):
    """Rows of a table, (V, D).

    Args:
        weight: the table.
        fixed: a row that is never trained, or None.
    """

    def __init__(self, weight: Dense, fixed: int | None = None) -> None:
        self.weight, self.fixed = weight, fixed

    def __call__(self, index: Array) -> Array:
        """(T,) to (T, D)."""
        # Rounded once they are read: the slopes of a token's many places are summed in float32.
        rows = self.weight.source[index].astype(self.weight.dtype)
        if self.weight.trained and self.fixed is not None:
            rows = jnp.where((index == self.fixed)[:, None], lax.stop_gradient(rows), rows)
        return rows


class RMSNorm(nnx.Module):
    """x / rms(x) · weight, the quotient in float32 (Zhang & Sennrich 2019)."""

    def __init__(self, weight: Dense, epsilon: float) -> None:
        self.weight, self.epsilon = weight, epsilon

    def __call__(self, x: Array) -> Array:
        """Over the last axis."""
        wide = x.astype(jnp.float32)
        wide = wide * lax.rsqrt((wide * wide).mean(axis=-1, keepdims=True) + self.epsilon)
        return self.weight() * wide.astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x - mean) / deviation · weight + bias, in float32 (Ba et al. 2016)."""

    def __init__(self, weight: Dense, bias: Dense, epsilon: float) -> None:
        self.weight, self.bias, self.epsilon = weight, bias, epsilon

    def __call__(self, x: Array) -> Array:
        """Over the last axis."""
        wide = x.astype(jnp.float32)
        wide = wide - wide.mean(axis=-1, keepdims=True)
        wide = wide * lax.rsqrt((wide * wide).mean(axis=-1, keepdims=True) + self.epsilon)
        return (wide * self.weight() + self.bias()).astype(x.dtype)


@attrs.frozen(kw_only=True)
class Parts:
    """Makes the smallest modules from what was loaded.

    Attributes:
        layout: of the model.
        base: stacked name → weight, from ``weights.load_base``.
        ranks: stacked module path → largest rank of its layers' adapters; absent for none.
        scales: stacked module path → s of the adapter, or of each layer's, (layers,).
        whole: stacked name of a tensor that is trained whole → the layers of which it is, 0 for one in none.
    """

    layout: Layout
    base: Mapping[str, Array | NF4Weight]
    ranks: Mapping[str, int]
    scales: Mapping[str, float | Array]
    whole: Mapping[str, Container[int]]

    def linear(self, path: str) -> LoraLinear:
        """The stacked linear at a path, with its adapter."""
        weight, bias = self.base[f"{path}.weight"], cast("Array | None", self.base.get(f"{path}.bias"))
        # NF4 is stored in (out, in) for every family.
        dense_conv1d = self.layout.family == "gpt2" and not isinstance(weight, NF4Weight)
        kind = Conv1D if dense_conv1d else LoraLinear
        return kind(weight, bias, self.ranks.get(path, 0), self.scales.get(path, 0.0))

    def embedding(self, path: str) -> Embedding:
        """The table at a path."""
        name = f"{path}.weight"
        return Embedding(self._dense(name), untrained_row(self.layout) if name in TABLES else None)

    def rms_norm(self, path: str) -> RMSNorm:
        """The norm at a path."""
        return RMSNorm(self._dense(f"{path}.weight"), self.layout.norm_eps)

    def layer_norm(self, path: str) -> LayerNorm:
        """The norm at a path."""
        return LayerNorm(self._dense(f"{path}.weight"), self._dense(f"{path}.bias"), self.layout.norm_eps)

    def _dense(self, name: str) -> Dense:
        tensor, stacked = cast("Array", self.base[name]), name.startswith(BLOCKS)
        return Dense(tensor, self.whole.get(name, ()), len(tensor) if stacked else 1)
