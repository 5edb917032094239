"""A linear layer with a low-rank update (Hu et al. 2021, LoRA, section 4.1).

::

          x (T, in) ───────────────┐
          │                        │ Aᵀ (in, R)      A: (R, in) float32, trained
          │ Wᵀ (in, out)           ▼
          │ frozen, dense or NF4   x Aᵀ (T, R)       B: (out, R) float32, trained
          │                        │ Bᵀ (R, out)
          ▼                        ▼
          x Wᵀ + b    +    s · (x Aᵀ) Bᵀ     =  y (T, out)

With dy the gradient of y and u = s · dy B:  dA = uᵀ x,  dB = s · dyᵀ (x Aᵀ),  dx = dy W + u A.
Under dropout with probability p and mask m of zeros and ones, m ⊙ x takes the place of x on the right-hand branch and
s / (1 - p) that of s: then dx = dy W + m ⊙ (u A).
Layers are built stacked, with one more axis in front, and called one at a time inside a scan (``model``), so an
NF4 weight is brought back for one layer, twice, and never kept.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import cast

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from mens_core.errors import ContractError, ModelError
from mens_jax._arrays import dot, keep
from mens_jax.dropout import Dropout
from mens_jax.quant import NF4Weight, dequantize

__all__ = ["LoraLinear", "merge", "select_targets"]


class LoraLinear(nnx.Module):
    """y = x Wᵀ + b + s · (x Aᵀ) Bᵀ, computed in the format of x.

    Opens as the identity on the base: A and B are zero. Of rank 0 it is the frozen layer alone. Entries of A's input
    are dropped while ``dropout`` is set, which a training step does for one batch.

    Invariants: weight and bias never change; A and B are float32 whatever the base's format.

    Args:
        weight: (out, in), frozen; (layers, out, in) for stacked layers, and so on for the others.
        bias: (out,), frozen, or None.
        rank: R; of stacked layers the largest, where the others' A has zero rows and their B zero columns, which no
            update ever moves.
        scale: s, dimensionless; (layers,) where stacked layers have scales of their own.
    """

    # Whether a dense weight is stored as (in, out); a subclass says so.
    transposed = False

    def __init__(self, weight: Array | NF4Weight, bias: Array | None, rank: int, scale: float | Array) -> None:
        out, into = weight.shape[-2:][:: -1 if self.transposed else 1]
        stacked = weight.codes.shape[:-1] if isinstance(weight, NF4Weight) else weight.shape[:-2]
        self.shape, self.rank = (out, into), rank
        # One number is compiled in; many go through the scan with their layers.
        self.scale = nnx.Variable(scale) if isinstance(scale, Array) else scale
        self.dropout: Dropout | None = nnx.data(None)
        self.weight = nnx.Param(weight)
        self.bias = None if bias is None else nnx.Param(bias)
        # By NumPy: JAX compiles zeros of each shape, which took a fifth of the time to open two gigabytes.
        self.lora_a = nnx.LoRAParam(np.zeros((*stacked, rank, into), np.float32)) if rank else None
        self.lora_b = nnx.LoRAParam(np.zeros((*stacked, out, rank), np.float32)) if rank else None

    def __call__(self, x: Array) -> Array:
        """Map (T, in) to (T, out)."""
        weight = self.weight.get_value()
        weight = dequantize(weight, x.dtype) if isinstance(weight, NF4Weight) else weight
        y = dot(x, weight if self.transposed else weight.T)
        if self.bias is not None:
            y = y + self.bias.get_value()
        if self.lora_a is not None and self.lora_b is not None:
            entered, scale = x, cast("float | Array", self.scale)
            if isinstance(self.scale, nnx.Variable):
                scale = self.scale.get_value()
            if self.dropout is not None:
                # The factor 1 / (1 - p) goes where it costs nothing and is not rounded to the format of x.
                entered, scale = x * self.dropout.kept(x), scale / (1.0 - self.dropout.probability)
            # Scaled while it is narrow, which spares both passes a multiplication as wide as y.
            down = (scale * dot(entered, self.lora_a.get_value().astype(x.dtype).T)).astype(x.dtype)
            y = y + dot(down, self.lora_b.get_value().astype(x.dtype).T)
        return keep(y)


def merge(weight: Array, lora_a: Array, lora_b: Array, scale: float) -> Array:
    """W + s · B A, computed in float32 (Hu et al. 2021, section 4.1).

    Args:
        weight: (out, in).
        lora_a: (R, in).
        lora_b: (out, R).
        scale: s, dimensionless.

    Returns:
        (out, in) float32, newly allocated.

    Raises:
        ModelError: if the shapes do not fit; nothing is broadcast.
    """
    shapes = [tuple(array.shape) for array in (weight, lora_a, lora_b)]
    if any(len(shape) != 2 for shape in shapes) or (
        shapes[0] != (shapes[2][0], shapes[1][1]) or shapes[1][0] != shapes[2][1]
    ):
        raise ModelError(
            "an adapter does not fit its weight",
            where=f"weight {shapes[0]}, lora_A {shapes[1]}, lora_B {shapes[2]}",
            expected="weight (out, in), lora_A (rank, in), lora_B (out, rank)",
        )
    weight, lora_a, lora_b = (array.astype(jnp.float32) for array in (weight, lora_a, lora_b))
    return weight + scale * dot(lora_b, lora_a)


def select_targets(paths: Sequence[str], targets: tuple[str, ...]) -> tuple[str, ...]:
    """Choose the linear layers to adapt.

    Args:
        paths: module paths of every linear layer inside the decoder.
        targets: ``("all-linear",)``, or names; a path is chosen if it equals a name or ends with ``.<name>``.

    Returns:
        The chosen paths, in the order of ``paths``.

    Raises:
        ContractError: if a name matches no path.
    """
    if targets == ("all-linear",):
        return tuple(paths)
    known = sorted({path.rpartition(".")[2] for path in paths})
    for name in targets:
        if not any(f".{path}".endswith(f".{name}") for path in paths):
            close = difflib.get_close_matches(name, [*known, *paths], n=1)
            raise ContractError(
                f"no linear layer is called {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""),
                where=f"targets = {', '.join(targets)}",
                expected=f"all-linear, or names out of {', '.join(known)}",
            )
    return tuple(path for path in paths if any(f".{path}".endswith(f".{name}") for name in targets))
