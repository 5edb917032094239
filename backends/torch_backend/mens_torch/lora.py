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
Only x, or what it can be made from again (``_remade``), and x Aᵀ are kept for the backward pass; an NF4 weight is
brought back twice and never kept.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor as Array
from torch import nn

from mens_core.errors import ContractError, ModelError
from mens_torch._products import linear, product
from mens_torch._remade import Origin, origin_of
from mens_torch._scratch import scratch
from mens_torch.dropout import Dropout
from mens_torch.quant import NF4Weight, dequantize

__all__ = ["LoraLinear", "merge", "select_targets"]

# Numbers whose merge takes a millisecond at most: threads that wait for each other take longer.
_FEW = 1 << 20


class LoraLinear(nn.Module):
    """y = x Wᵀ + b + s · (x Aᵀ) Bᵀ, computed in the format of x.

    Opens as the identity on the base: A and B are zero. Of rank 0 it is the frozen layer alone. Entries of A's input
    are dropped while ``dropout`` is set, which a training step does for one batch.

    Invariants: weight and bias never change; A and B are float32 whatever the base's format.

    Args:
        weight: (out, in), frozen. GPT-2's Conv1D holds the transpose: pass a transposed view.
        bias: (out,), frozen, or None.
        rank: R.
        scale: s, dimensionless.
    """

    def __init__(self, weight: Array | NF4Weight, bias: Array | None, rank: int, scale: float) -> None:
        super().__init__()
        out, into = weight.shape
        device = weight.codes.device if isinstance(weight, NF4Weight) else weight.device
        # Not a module attribute called "weight": code that reads it past forward would lose the adapter in silence.
        self.frozen, self.bias, self.rank, self.scale = weight, bias, rank, scale
        self.dropout: Dropout | None = None
        self.lora_a = nn.Parameter(torch.zeros(rank, into, device=device), requires_grad=rank > 0)
        self.lora_b = nn.Parameter(torch.zeros(out, rank, device=device), requires_grad=rank > 0)

    def forward(self, x: Array) -> Array:
        """Map (..., in) to (..., out)."""
        dropout = self.dropout
        if dropout is not None:
            # A layer that is called again for the same batch, as for rows that run one at a time, draws another mask.
            self.dropout = dropout.fold("again")
        given = (x, self.frozen, self.bias, self.lora_a, self.lora_b, self.scale, dropout)
        if not torch.is_grad_enabled():
            # A token at a time, a node that nobody asks for slopes would be a thirtieth of the work.
            return _product(*given)[0]
        product: Array = _lora_product(*given, origin_of(x))  # type: ignore[no-untyped-call]
        return product


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
    with _alone() if weight.numel() <= _FEW else nullcontext():
        # In PEFT's order of roundings, so that a merge by either gives the same bits.
        return (lora_b.float() @ lora_a.float()).mul_(scale).add_(weight)


@contextmanager
def _alone() -> Iterator[None]:
    """In the calling thread only."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def select_targets(paths: Sequence[str], targets: tuple[str, ...]) -> tuple[str, ...]:
    """Choose the linear layers to adapt.

    Args:
        paths: module paths of every linear layer inside the decoder.
        targets: ``("all-linear",)``, or names; a path is chosen if it equals a name or ends with ``.<name>``.

    Returns:
        The chosen paths, in the order of ``paths``.

    Raises:
        ModelError: if there is no linear layer at all.
        ContractError: if a name matches no path.
    """
    if not paths:
        raise ModelError("the decoder has no linear layer that could be adapted")
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


def _dense(weight: Array | NF4Weight, dtype: torch.dtype) -> Array:
    """(out, in), for one product: on a CPU an NF4 weight lies in memory that the next one takes over."""
    if not isinstance(weight, NF4Weight):
        return weight
    if weight.codes.device.type != "cpu":
        return dequantize(weight, dtype)
    return weight.write(scratch(math.prod(weight.shape), dtype))


def _product(
    x: Array,
    weight: Array | NF4Weight,
    bias: Array | None,
    lora_a: Array,
    lora_b: Array,
    scale: float,
    dropout: Dropout | None,
) -> tuple[Array, Array | None]:
    """(y, x Aᵀ of all positions in rows); the latter is None where the rank is 0."""
    y = linear(x, _dense(weight, x.dtype), bias)
    if not lora_a.shape[0]:
        return y, None
    rows = x.reshape(-1, x.shape[-1])
    entered = rows if dropout is None else rows * dropout.kept(rows)
    down = linear(entered, lora_a.to(x.dtype))
    y.view(-1, y.shape[-1]).addmm_(down, lora_b.to(x.dtype).t(), alpha=_scale(scale, dropout))
    return y, down


def _slope(out: Array, entered: Array, scale: float) -> Array:
    """S · outᵀ entered, summed over the rows; what is summed up is multiplied before it is rounded to bfloat16."""
    # With beta 0 the first is read for its format alone.
    return torch.addmm(out.new_empty(()), out.t(), entered, beta=0, alpha=scale).float()


def _scale(scale: float, dropout: Dropout | None) -> float:
    """S / (1 - p): the factor goes where it costs nothing and is not rounded to the format of x."""
    return scale if dropout is None else scale / (1.0 - dropout.probability)


class _LoraProduct(torch.autograd.Function):
    """The formula above as one node, so that nothing but its x and x Aᵀ waits for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Array,
        weight: Array | NF4Weight,
        bias: Array | None,
        lora_a: Array,
        lora_b: Array,
        scale: float,
        dropout: Dropout | None,
        origin: Origin | None,
    ) -> Array:
        y, down = _product(x, weight, bias, lora_a, lora_b, scale, dropout)
        ctx.weight, ctx.shape, ctx.dropout, ctx.scale = weight, x.shape, dropout, _scale(scale, dropout)
        ctx.adapted = down is not None
        if ctx.adapted:
            ctx.make, tensors = origin or (None, (x,))
            ctx.save_for_backward(down, lora_a, lora_b, *tensors)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Array) -> tuple[Array | None, ...]:
        dy, scale = grads[0].reshape(-1, grads[0].shape[-1]), ctx.scale
        dx = product(dy, _dense(ctx.weight, dy.dtype)) if ctx.needs_input_grad[0] else None
        grad_a = grad_b = None
        if ctx.adapted:
            down, lora_a, lora_b, *tensors = ctx.saved_tensors
            lora_a, lora_b = (factor.to(dy.dtype) for factor in (lora_a, lora_b))
            x = tensors[0] if ctx.make is None else ctx.make(*tensors)
            rows = x.reshape(-1, ctx.shape[-1])
            up = product(dy, lora_b)
            kept = None if ctx.dropout is None else ctx.dropout.kept(rows)
            grad_a = _slope(up, rows if kept is None else rows * kept, scale)
            grad_b = _slope(dy, down, scale)
            if dx is not None:
                dx = dx.addmm_(up, lora_a, alpha=scale) if kept is None else dx.addcmul_(up @ lora_a, kept, value=scale)
        return None if dx is None else dx.view(ctx.shape), None, None, grad_a, grad_b, None, None, None


# Function.apply looks for wrappers of functorch in every argument, a twentieth of a tiny model's step; none comes here.
_lora_product = super(torch.autograd.Function, _LoraProduct).apply
