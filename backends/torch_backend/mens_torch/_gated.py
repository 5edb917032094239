"""Gated layers (Shazeer 2020, arXiv:2002.05202, SwiGLU) whose gate is one node of the graph.

::

    x ─┬─▶ gate_proj ─▶ g ──┐
       │                    ├─▶ h = silu(g) · u ─▶ down_proj ─▶ y        da = dh · u,  dg = silu'(g) · da
       └─▶ up_proj ───▶ u ──┘                                            du = dh · silu(g)

Kept are g and u; silu(g), which transformers' two operations keep as well, is made from g again.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor as Array
from torch import nn
from transformers.activations import SiLUActivation

from mens_torch._activations import SiLU
from mens_torch._remade import Origin, remember
from mens_torch._trial import gives_the_bits_of
from mens_torch.lora import LoraLinear

__all__ = ["fuse_gates"]

_CHILDREN = {"gate_proj", "up_proj", "down_proj", "act_fn"}
# Rows, width and inner width that a module is tried with.
_ROWS, _WIDTH, _INNER = 3, 8, 12


def fuse_gates(network: Any, dtype: torch.dtype) -> None:
    """Let those layers of a network compute their gate by one node that are found to be just this.

    Args:
        network: transformers' model, on its device.
        dtype: what it computes in.
    """
    for module in network.modules():
        children = dict(module.named_children())
        if children.keys() == _CHILDREN and type(children["act_fn"]) in {nn.SiLU, SiLUActivation}:
            silu = SiLU()
            if _is_this(module, silu, dtype, next(module.parameters()).device):
                module.forward = _fused(children | {"act_fn": silu}, again=dtype == torch.float32)
                module.act_fn = silu


def _is_this(module: Any, silu: SiLU, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether it is how a module puts its linears together; tried with small ones, since its own may be gigabytes."""

    def drawn(*shape: int) -> Array:
        return torch.linspace(-2, 2, math.prod(shape), device=device).view(shape).to(dtype)

    shapes = {"gate_proj": (_INNER, _WIDTH), "up_proj": (_INNER, _WIDTH), "down_proj": (_WIDTH, _INNER)}
    linears = {name: LoraLinear(drawn(*shape), None, 0, 0.0) for name, shape in shapes.items()}
    small = copy.copy(module)
    small._modules = {"act_fn": module.act_fn, **linears}  # noqa: SLF001 (a module's own is not to be touched)
    try:
        return gives_the_bits_of(small, _fused(linears | {"act_fn": silu}, again=False), drawn(1, _ROWS, _WIDTH))
    except RuntimeError:
        return False  # It asks for its own widths.


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
