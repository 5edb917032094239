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
from mens_torch._products import Products, linear, products
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

    @property
    def updates(self) -> bool:
        """Whether there is an update at all."""
        return self.lora_a.shape[0] > 0


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
    updates = [layer for layer in layers if layer.updates]
    factors = [layer.lora_a for layer in updates] + [layer.lora_b for layer in updates]
    ys: tuple[Array, ...] = _node(x, layers, scale, dropout, origin_of(x), *factors)  # type: ignore[no-untyped-call]
    return ys


def adapted_alone(x: Array, layer: Adapted, scale: float) -> Array:
    """Y of one layer, without dropout and without a gradient: (..., out), every bit as from ``adapted``.

    One row may be summed in another order, as memory gives a weight fastest.
    """
    # A token at a time, what the node does besides would be a twentieth of the work.
    weight, bias, by = layer.weight, layer.bias, products(x)
    if isinstance(weight, NF4Weight) and weight.is_one_row(x):
        y = weight.row_product(x)
        if bias is not None:
            y.add_(bias)
    else:
        y = linear(x, _dense(weight, x.dtype), bias)
    if layer.updates:
        _updated(by, y, x.reshape(-1, x.shape[-1]), layer, scale)
    return y


def _updated(by: Products, y: Array, entered: Array, layer: Adapted, scale: float) -> Array:
    """Add s · (x Aᵀ) Bᵀ to y, in place; returns x Aᵀ, (T, R), of x in rows."""
    down = by.product(entered, rounded(layer.lora_a, y.dtype).t())
    by.add_update(y.view(-1, y.shape[-1]), down, rounded(layer.lora_b, y.dtype).t(), scale)
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
        by, rows, ys, downs = products(x), x.reshape(-1, x.shape[-1]), [], []
        ctx.layers, ctx.scale, ctx.dropout, ctx.shape = layers, _rescaled(scale, dropout), dropout, x.shape
        entered = rows if dropout is None or not factors else rows * dropout.kept(rows)
        for layer in layers:
            y = by.linear(x, _dense(layer.weight, x.dtype), layer.bias)
            if layer.updates:
                downs.append(_updated(by, y, entered, layer, ctx.scale))
            ys.append(y)
        if downs:
            ctx.make, tensors = origin or (None, (x,))
            ctx.save_for_backward(*downs, *factors, *tensors)
        ctx.updates = len(downs)
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *grads: Array) -> tuple[Array | None, ...]:
        layers, scale, by, dx = ctx.layers, ctx.scale, products(grads[0]), None
        # A and B as autograd kept them: it notices if they were written into meanwhile.
        saved, count = ctx.saved_tensors, ctx.updates
        downs, lora_as, lora_bs, tensors = (
            saved[:count],
            saved[count : 2 * count],
            saved[2 * count : 3 * count],
            saved[3 * count :],
        )
        ups: list[Array] = []
        of_a: tuple[Array, ...] = ()
        of_b: list[Array] = []
        for grad, layer in zip(grads, layers, strict=True):
            dy = grad.reshape(-1, grad.shape[-1])
            if ctx.needs_input_grad[0]:
                dx = by.product(dy, _dense(layer.weight, dy.dtype), dx)
            if layer.updates:
                of_b.append(by.slope(dy, downs[len(ups)], scale))
                ups.append(by.product(dy, rounded(lora_bs[len(ups)], dy.dtype)))
        if ups:
            rows = (tensors[0] if ctx.make is None else ctx.make(*tensors)).reshape(-1, ctx.shape[-1])
            kept, up = None if ctx.dropout is None else ctx.dropout.kept(rows), _joined(ups, dim=1)
            slope = by.slope(up, rows if kept is None else rows * kept, scale)
            of_a = slope.split_with_sizes([down.shape[1] for down in downs])
            if dx is not None:
                lora_a = rounded(_joined(lora_as), up.dtype)
                if kept is None:
                    by.add_update(dx, up, lora_a, scale)
                else:
                    dx.addcmul_(by.product(up, lora_a), kept, value=scale)
        return None if dx is None else dx.view(ctx.shape), None, None, None, None, *of_a, *of_b


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
