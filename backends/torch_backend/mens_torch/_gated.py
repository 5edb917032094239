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
from transformers.activations import SiLUActivation

from mens_torch._activations import SiLU
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
            children["act_fn"] = SiLU()
            fused = _fused(children, again=dtype == torch.float32)
            if gives_the_bits_of(module, fused, x):
                module.forward, module.act_fn = fused, children["act_fn"]


def _fused(parts: dict[str, Any], *, again: bool) -> Callable[[Array], Array]:
    """The layer's forward pass; ``again`` lets down_proj make h again as well, as ``_remade`` does with a GELU."""
    gate, up, down, silu = (parts[name] for name in ("gate_proj", "up_proj", "down_proj", "act_fn"))

    def gated(g: Array, u: Array) -> Array:
        return cast("Array", silu.values(g).mul_(u))

    def forward(x: Array) -> Array:
        g, u = gate(x), up(x)
        if not torch.is_grad_enabled():
            return cast("Array", down(gated(g, u)))
        h: Array = _node(g, u, silu)  # type: ignore[no-untyped-call]
        if again:
            remember(h, Origin(gated, (g, u)))
        return cast("Array", down(h))

    return forward


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g: Array, u: Array, silu: SiLU) -> Array:
        ctx.save_for_backward(g, u)
        ctx.silu = silu
        return silu.values(g).mul_(u)

    @staticmethod
    def backward(ctx: Any, *grads: Array) -> tuple[Array, Array, None]:
        g, u = ctx.saved_tensors
        # The two operations that autograd makes of these, and so, where PyTorch makes them, the same bits.
        return ctx.silu.slopes(grads[0] * u, g), ctx.silu.values(g).mul_(grads[0]), None


# Without the look for functorch's wrappers, as in _adapted.
_node = super(torch.autograd.Function, _Gate).apply
