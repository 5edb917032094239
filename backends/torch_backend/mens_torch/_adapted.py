"""What a linear layer with a low-rank update computes, and its slopes, as one node for all that read one tensor.

::

          x (T, in) ───────────────┐
          │                        │ Aᵀ (in, R)      A: (R, in) float32, trained
          │ Wᵀ (in, out)           ▼
          │ frozen, dense or NF4   x Aᵀ (T, R)       B: (out, R) float32, trained
          │                        │ Bᵀ (R, out)
          ▼                        ▼
          x Wᵀ + b    +    s · (x Aᵀ) Bᵀ     =  y (T, out)

With dy the gradient of y and u = s · dy B:  dA = uᵀ x,  dB = s · dyᵀ (x Aᵀ),  dx = Σ dy W + u A, over all that read x.
Under dropout with probability p and mask m of zeros and ones, m ⊙ x takes the place of x on the right-hand branch and
s / (1 - p) that of s: then dx = Σ dy W + m ⊙ (u A).
Only x, or what it can be made from again (``_remade``), and each x Aᵀ are kept for the backward pass; an NF4 weight is
brought back twice and never kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor as Array

from mens_torch._products import linear, product
from mens_torch._remade import Origin, origin_of
from mens_torch._scratch import scratch
from mens_torch.dropout import Dropout
from mens_torch.quant import NF4Weight, dequantize

__all__ = ["Adapted", "adapted", "all_adapted"]


class Adapted(NamedTuple):
    """A linear with its update, for one call.

    Attributes:
        weight: W, (out, in).
        bias: b, (out,), or None.
        lora_a: A, (R, in) float32; R may be 0.
        lora_b: B, (out, R) float32.
        scale: s.
        dropout: of the update's input, or None.
    """

    weight: Array | NF4Weight
    bias: Array | None
    lora_a: Array
    lora_b: Array
    scale: float
    dropout: Dropout | None

    @property
    def rescaled(self) -> float:
        """S / (1 - p): the factor goes where it costs nothing and is not rounded to the format of x."""
        return self.scale if self.dropout is None else self.scale / (1.0 - self.dropout.probability)


def adapted(x: Array, layer: Adapted) -> Array:
    """Y (..., out) of x (..., in), in its format, without a gradient."""
    return _computed(x, layer)[0]


def all_adapted(x: Array, layers: Sequence[Adapted]) -> tuple[Array, ...]:
    """Y of each layer, by one node of the graph."""
    factors = [factor for layer in layers for factor in (layer.lora_a, layer.lora_b)]
    ys: tuple[Array, ...] = _node(x, layers, origin_of(x), *factors)  # type: ignore[no-untyped-call]
    return ys


def _computed(x: Array, layer: Adapted) -> tuple[Array, Array | None]:
    """(y, x Aᵀ of all positions in rows); the latter is None where the rank is 0."""
    y = linear(x, _dense(layer.weight, x.dtype), layer.bias)
    if not layer.lora_a.shape[0]:
        return y, None
    rows = x.reshape(-1, x.shape[-1])
    entered = rows if layer.dropout is None else rows * layer.dropout.kept(rows)
    down = linear(entered, layer.lora_a.to(x.dtype))
    y.view(-1, y.shape[-1]).addmm_(down, layer.lora_b.to(x.dtype).t(), alpha=layer.rescaled)
    return y, down


class _AllAdapted(torch.autograd.Function):
    """The formula above as one node, so that nothing but its x and x Aᵀ waits for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Array, layers: Sequence[Adapted], origin: Origin | None, *factors: Array
    ) -> tuple[Array, ...]:
        ys, downs = zip(*(_computed(x, layer) for layer in layers), strict=True)
        ctx.layers, ctx.shape = layers, x.shape
        ctx.make, tensors = origin or (None, (x,))
        ctx.save_for_backward(*downs, *factors, *(tensors if any(down is not None for down in downs) else ()))
        return ys

    @staticmethod
    def backward(ctx: Any, *grads: Array) -> tuple[Array | None, ...]:
        layers, saved = ctx.layers, iter(ctx.saved_tensors)
        downs = [next(saved) for _ in layers]
        factors = [(next(saved), next(saved)) for _ in layers]
        tensors = tuple(saved)
        rows = (tensors[0] if ctx.make is None else ctx.make(*tensors)).reshape(-1, ctx.shape[-1]) if tensors else None
        dx: Array | None = None
        slopes: list[Array | None] = []
        for layer, down, pair, grad in zip(layers, downs, factors, grads, strict=True):
            dy = grad.reshape(-1, grad.shape[-1])
            if ctx.needs_input_grad[0]:
                dx = product(dy, _dense(layer.weight, dy.dtype), dx)
            slopes += [None, None] if down is None or rows is None else _slopes(layer, rows, down, pair, dy, dx)
        return None if dx is None else dx.view(ctx.shape), None, None, *slopes


# Function.apply looks for wrappers of functorch in every argument, a twentieth of a tiny model's step; none comes here.
_node = super(torch.autograd.Function, _AllAdapted).apply


def _dense(weight: Array | NF4Weight, dtype: torch.dtype) -> Array:
    """(out, in), for one product: on a CPU an NF4 weight lies in memory that the next one takes over."""
    if not isinstance(weight, NF4Weight):
        return weight
    if weight.codes.device.type != "cpu":
        return dequantize(weight, dtype)
    return weight.write(scratch(math.prod(weight.shape), dtype))


def _slope(out: Array, entered: Array, scale: float) -> Array:
    """S · outᵀ entered, summed over the rows; what is summed up is multiplied before it is rounded to bfloat16."""
    # With beta 0 the first is read for its format alone.
    return torch.addmm(out.new_empty(()), out.t(), entered, beta=0, alpha=scale).float()


def _slopes(
    layer: Adapted, rows: Array, down: Array, pair: tuple[Array, Array], dy: Array, dx: Array | None
) -> list[Array]:
    """[dA, dB]; adds u A to dx, where that is wanted."""
    # A and B as autograd kept them: it notices if they were written into meanwhile.
    lora_a, lora_b = (factor.to(dy.dtype) for factor in pair)
    scale, kept = layer.rescaled, None if layer.dropout is None else layer.dropout.kept(rows)
    up = product(dy, lora_b)
    if dx is not None:
        _ = dx.addmm_(up, lora_a, alpha=scale) if kept is None else dx.addcmul_(up @ lora_a, kept, value=scale)
    return [_slope(up, rows if kept is None else rows * kept, scale), _slope(dy, down, scale)]
