"""Gated layers (Shazeer 2020, arXiv:2002.05202, SwiGLU) whose gate is one node of the graph.

::

    x ─┬─▶ gate_proj ─▶ g ──┐
       │                    ├─▶ h = silu(g) · u ─▶ down_proj ─▶ y        da = dh · u,  dg = silu'(g) · da
       └─▶ up_proj ───▶ u ──┘                                            du = dh · silu(g)

Kept are g and u; silu(g), which transformers' two operations keep as well, is made from g again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor as Array
from torch import nn
from torch.nn import functional
from transformers.activations import SiLUActivation

from mens_torch._remade import Origin, remember
from mens_torch._trial import gives_the_bits_of

__all__ = ["fuse_gates"]

_CHILDREN = {"gate_proj", "up_proj", "down_proj", "act_fn"}
# Rows of the input that a module is tried with.
_ROWS = 3


def fuse_gates(network: Any, dtype: torch.dtype) -> None:
    """Let those layers of a network compute their gate by one node that are found to be just this.

    Args:
        network: transformers' model, on its device.
        dtype: what it computes in.
    """
    for module in network.modules():
        children = dict(module.named_children())
        if children.keys() == _CHILDREN and type(children["act_fn"]) in {nn.SiLU, SiLUActivation}:
            width, device = module.gate_proj.in_features, next(module.parameters()).device
            x = torch.linspace(-2, 2, _ROWS * width, device=device).view(1, _ROWS, width).to(dtype)
            fused = _fused(children, again=dtype == torch.float32)
            if gives_the_bits_of(module, fused, x):
                module.forward = fused


def _fused(parts: dict[str, Any], *, again: bool) -> Callable[[Array], Array]:
    """The layer's forward pass; ``again`` lets down_proj make h again as well, as ``_remade`` does with a GELU."""
    gate, up, down = (parts[name] for name in ("gate_proj", "up_proj", "down_proj"))

    def forward(x: Array) -> Array:
        g, u = gate(x), up(x)
        if not torch.is_grad_enabled():
            return cast("Array", down(_gated(g, u)))
        h: Array = _node(g, u)  # type: ignore[no-untyped-call]
        if again:
            remember(h, Origin(_gated, (g, u)))
        return cast("Array", down(h))

    return forward


def _gated(g: Array, u: Array) -> Array:
    return functional.silu(g).mul_(u)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g: Array, u: Array) -> Array:
        ctx.save_for_backward(g, u)
        return _gated(g, u)

    @staticmethod
    def backward(ctx: Any, *grads: Array) -> tuple[Array, Array]:
        g, u = ctx.saved_tensors
        # The two operations that autograd makes of these, and so the same bits.
        return torch.ops.aten.silu_backward(grads[0] * u, g), functional.silu(g).mul_(grads[0])


# Without the look for functorch's wrappers, as in _adapted.
_node = super(torch.autograd.Function, _Gate).apply
