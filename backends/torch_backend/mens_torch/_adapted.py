"""What a linear layer with a low-rank update computes, and its slopes, as one node for all that read one tensor.

::

          x (T, in) ───────────────┐
          │                        │ Aᵀ (in, R)      A: (R, in) float32, trained
          │ Wᵀ (in, out)           ▼
          │ frozen, dense or NF4   x Aᵀ (T, R)       B: (out, R) float32, trained
          │                        │ Bᵀ (R, out)
          ▼                        ▼
          x Wᵀ + b    +    s · (x Aᵀ) Bᵀ     =  y (T, out)

With dy the gradient of y and u = dy B:  dA = s · uᵀ x,  dB = s · dyᵀ (x Aᵀ),  dx = Σ dy W + s · u A, summed over all
that read x. All their dA are one product, and all their u A another.
Under dropout with probability p and mask m of zeros and ones, m ⊙ x takes the place of x on the right-hand branch and
s / (1 - p) that of s: then dx = dy W + m ⊙ (s · u A).
Only x, or what it can be made from again (``_remade``), and each x Aᵀ are kept for the backward pass; an NF4 weight is
brought back twice and never kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor as Array

from mens_torch._formats import rounded
from mens_torch._products import add_update, linear, product, slope
from mens_torch._remade import Origin, origin_of
from mens_torch._scratch import scratch
from mens_torch.dropout import Dropout
from mens_torch.quant import NF4Weight, dequantize

__all__ = ["Adapted", "adapted", "adapted_alone"]


class Adapted(NamedTuple):
    """A linear and its update.

    Attributes:
        weight: W, (out, in).
        bias: b, (out,), or None.
        lora_a: A, (R, in) float32; R may be 0.
        lora_b: B, (out, R) float32.
    """

    weight: Array | NF4Weight
    bias: Array | None
    lora_a: Array
    lora_b: Array


def adapted(x: Array, layers: Sequence[Adapted], scale: float, dropout: Dropout | None) -> tuple[Array, ...]:
    """Y of each layer, by one node of the graph.

    Args:
        x: (..., in).
        layers: one or more.
        scale: s, of all of them.
        dropout: of what enters their updates, or None.

    Returns:
        (..., out) of each, in the format of x.
    """
    factors = [factor for layer in layers for factor in (layer.lora_a, layer.lora_b)]
    ys: tuple[Array, ...] = _node(x, layers, scale, dropout, origin_of(x), *factors)  # type: ignore[no-untyped-call]
    return ys


def adapted_alone(x: Array, layer: Adapted, scale: float) -> Array:
    """Y of one layer, without dropout and without a gradient: (..., out), every bit as from ``adapted``.

    One row times a weight in NF4 is summed in another order.
    """
    # A token at a time, what the node does besides would be a twentieth of the work.
    weight, bias = layer.weight, layer.bias
    if isinstance(weight, NF4Weight) and weight.is_one_row(x):
        y = weight.row_product(x)
        if bias is not None:
            y.add_(bias)
    else:
        y = linear(x, _dense(weight, x.dtype), bias)
    if layer.lora_a.shape[0]:
        _updated(y, x.reshape(-1, x.shape[-1]), layer, scale)
    return y


def _updated(y: Array, entered: Array, layer: Adapted, scale: float) -> Array:
    """Add s · (x Aᵀ) Bᵀ to y, in place; returns x Aᵀ, (T, R), of x in rows."""
    down = linear(entered, rounded(layer.lora_a, y.dtype))
    add_update(y.view(-1, y.shape[-1]), down, rounded(layer.lora_b, y.dtype).t(), scale)
    return down


class _Adapted(torch.autograd.Function):
    """The formula above as one node, so that nothing but its x and x Aᵀ waits for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Array,
        layers: Sequence[Adapted],
        scale: float,
        dropout: Dropout | None,
        origin: Origin | None,
        *factors: Array,
    ) -> tuple[Array, ...]:
        ys = tuple(linear(x, _dense(layer.weight, x.dtype), layer.bias) for layer in layers)
        ctx.layers, ctx.scale, ctx.dropout, ctx.shape = layers, _rescaled(scale, dropout), dropout, x.shape
        ctx.updated = any(layer.lora_a.shape[0] for layer in layers)
        if ctx.updated:
            rows = x.reshape(-1, x.shape[-1])
            entered = rows if dropout is None else rows * dropout.kept(rows)
            downs = [_updated(y, entered, layer, ctx.scale) for y, layer in zip(ys, layers, strict=True)]
            ctx.make, tensors = origin or (None, (x,))
            ctx.save_for_backward(*downs, *factors, *tensors)
        return ys

    @staticmethod
    def backward(ctx: Any, *grads: Array) -> tuple[Array | None, ...]:
        layers, scale = ctx.layers, ctx.scale
        dys = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        dx: Array | None = None
        if ctx.needs_input_grad[0]:
            for dy, layer in zip(dys, layers, strict=True):
                dx = product(dy, _dense(layer.weight, dy.dtype), dx)
        slopes: list[Array | None] = [None] * (2 * len(layers))
        if ctx.updated:
            count, saved = len(layers), ctx.saved_tensors
            # A and B as autograd kept them: it notices if they were written into meanwhile.
            downs, factors, tensors = saved[:count], saved[count : 3 * count], saved[3 * count :]
            rows = (tensors[0] if ctx.make is None else ctx.make(*tensors)).reshape(-1, ctx.shape[-1])
            up = _joined([product(dy, rounded(b, dy.dtype)) for dy, b in zip(dys, factors[1::2], strict=True)], dim=1)
            kept = None if ctx.dropout is None else ctx.dropout.kept(rows)
            of_a = slope(up, rows if kept is None else rows * kept, scale)
            slopes[0::2] = of_a.split_with_sizes([layer.lora_a.shape[0] for layer in layers])
            slopes[1::2] = [slope(dy, down, scale) for dy, down in zip(dys, downs, strict=True)]
            if dx is not None:
                lora_a = rounded(_joined(factors[0::2]), up.dtype)
                if kept is None:
                    add_update(dx, up, lora_a, scale)
                else:
                    dx.addcmul_(product(up, lora_a), kept, value=scale)
        return None if dx is None else dx.view(ctx.shape), None, None, None, None, *slopes


# Function.apply looks for wrappers of functorch in every argument, a twentieth of a tiny model's step; none comes here.
_node = super(torch.autograd.Function, _Adapted).apply


def _dense(weight: Array | NF4Weight, dtype: torch.dtype) -> Array:
    """(out, in), for one product: on a CPU an NF4 weight lies in memory that the next one takes over."""
    if not isinstance(weight, NF4Weight):
        return weight
    if weight.codes.device.type != "cpu":
        return dequantize(weight, dtype)
    return weight.write(scratch(math.prod(weight.shape), dtype))


def _rescaled(scale: float, dropout: Dropout | None) -> float:
    """S / (1 - p): the factor goes where it costs nothing and is not rounded to the format of x."""
    return scale if dropout is None else scale / (1.0 - dropout.probability)


def _joined(tensors: Sequence[Array], dim: int = 0) -> Array:
    """End to end; one alone without a copy."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)
