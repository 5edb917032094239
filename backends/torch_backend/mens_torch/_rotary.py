"""Rotary positions (Su et al. 2021, arXiv:2104.09864, section 3.4.2) of queries and keys as one node of the graph.

::

    x = (a, b), halves of a head      y = (a·cos₁ - b·sin₁, b·cos₂ + a·sin₂)      dx: dy, turned back

transformers turns each by six operations, and its backward pass fills a tensor with zeros for each half.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor as Array

__all__ = ["fuse_rotations"]

Rotate = Callable[[Array, Array, Array, Array, int], tuple[Array, Array]]
# What the families' modules call the function, and what it has to ask for.
_NAME, _ASKED = "apply_rotary_pos_emb", ["q", "k", "cos", "sin", "unsqueeze_dim"]
# Heads, tokens and width that a function is tried with.
_TRIED = (2, 3, 8)


def fuse_rotations(network: Any, dtype: torch.dtype) -> None:
    """Let those modules of a network rotate by one node whose function for it is found to be just this.

    The function is a global of a family's module. Only this network's ``forward`` methods see another one: they are
    made anew, of the same code and with other globals.

    Args:
        network: transformers' model, on its device.
        dtype: what it computes in.
    """
    for module in network.modules():
        forward = inspect.getattr_static(type(module), "forward")
        if isinstance(forward, types.FunctionType) and _NAME in forward.__code__.co_names:
            own: Any = forward.__globals__.get(_NAME)
            if "forward" not in vars(module) and _is_this(own, dtype, next(module.parameters()).device):
                module.forward = types.MethodType(_with_global(forward, _NAME, _one_node(own)), module)


def _one_node(own: Rotate) -> Rotate:
    """A family's function, by one node for what it was tried on: whole heads in one format."""

    def rotated(q: Array, k: Array, cos: Array, sin: Array, unsqueeze_dim: int = 1) -> tuple[Array, Array]:
        if q.shape[-1] != cos.shape[-1] or not q.dtype == k.dtype == cos.dtype:
            return own(q, k, cos, sin, unsqueeze_dim)
        return _rotated(q, k, cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim))

    return rotated


def _rotated(q: Array, k: Array, cos: Array, sin: Array) -> tuple[Array, Array]:
    if not torch.is_grad_enabled():
        return _turned(q, cos, sin), _turned(k, cos, sin)
    turned: tuple[Array, Array] = _node(q, k, cos, sin)  # type: ignore[no-untyped-call]
    return turned


def _turned(x: Array, cos: Array, sin: Array) -> Array:
    # Rounded as transformers' operations round, one by one.
    y = x * cos
    (y1, y2), (x1, x2), (sin1, sin2) = y.chunk(2, -1), x.chunk(2, -1), sin.chunk(2, -1)
    y1.sub_(x2 * sin1)
    y2.add_(x1 * sin2)
    return y


def _turned_back(dy: Array, cos: Array, sin: Array) -> Array:
    dx = dy * cos
    (dx1, dx2), (dy1, dy2), (sin1, sin2) = dx.chunk(2, -1), dy.chunk(2, -1), sin.chunk(2, -1)
    dx1.add_(dy2 * sin2)
    dx2.sub_(dy1 * sin1)
    return dx


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Array, k: Array, cos: Array, sin: Array) -> tuple[Array, Array]:
        ctx.save_for_backward(cos, sin)
        return _turned(q, cos, sin), _turned(k, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Array) -> tuple[Array, Array, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned_back(grads[0], cos, sin), _turned_back(grads[1], cos, sin), None, None


# Without the look for functorch's wrappers, as in _adapted.
_node = super(torch.autograd.Function, _Rotation).apply


@cache
def _is_this(own: Any, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a family's function gives every bit of this one, wherever the heads are."""
    if not callable(own) or list(inspect.signature(own).parameters) != _ASKED:
        return False
    heads, tokens, width = _TRIED
    numbers = torch.linspace(-2, 2, (2 * heads + 2) * tokens * width, device=device).to(dtype)
    numbers = numbers.view(-1, tokens, width)
    q, k, cos, sin = numbers[:heads], numbers[heads:-2], numbers[-2], numbers[-1]
    with torch.no_grad():
        for dim, (left, right) in ((1, (q, k)), (2, (q.transpose(0, 1), k.transpose(0, 1)))):
            given = left[None], right[None], cos[None], sin[None], dim
            try:
                expected = own(*given)
            except RuntimeError:
                return False  # It takes other shapes, as GPT-OSS' does, whose cosines are half as wide.
            for one, other in zip(expected, _one_node(own)(*given), strict=True):
                # PyTorch calls numbers equal whatever their formats.
                if one.dtype != other.dtype or not torch.equal(one, other):
                    return False
    return True


def _with_global(function: types.FunctionType, name: str, value: Any) -> types.FunctionType:
    """The same code where one global name means something else."""
    seen = function.__globals__ | {name: value}
    made = types.FunctionType(function.__code__, seen, function.__name__, function.__defaults__, function.__closure__)
    made.__kwdefaults__ = function.__kwdefaults__
    return made
