"""RMS norms (Zhang and Sennrich 2019, arXiv:1910.07467, section 4) as one node of the graph.

::

    r = 1 / √(mean x² + eps)     n = r · x     y = g · n            g: the gain, w or 1 + w
    dn = g · dy                  dx = r · (dn - n · mean(n · dn))   mean over the width

transformers writes them in six operations, of which autograd keeps two tensors in float32. Here x alone is kept, in
its own format, and linears that read y make it from x again (``_remade``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor as Array
from torch.nn.utils import parametrize

from mens_torch._formats import rounded
from mens_torch._remade import Origin, remember
from mens_torch._trial import gives_the_bits_of

__all__ = ["RMSNorm", "fuse_rms_norms"]

# Sizes of the numbers that a module is tried with: for the smallest eps is what counts.
_SIZES = (1e-4, 1.0, 30.0)


class RMSNorm:
    """What an RMS norm computes.

    Args:
        gain: (D,); where it has the format of x, n is rounded to that first, where it is float32, y alone is.
        eps: added to the mean square.
    """

    def __init__(self, gain: Array, eps: float) -> None:
        self.gain, self.eps = gain, eps

    def __call__(self, x: Array) -> Array:
        """(..., D) to (..., D), in the format of x."""
        if not torch.is_grad_enabled():
            return self.of(x)[0]
        y: Array = _node(x, self)  # type: ignore[no-untyped-call]
        remember(y, Origin(self, (x,)))
        return y

    def of(self, x: Array) -> tuple[Array, Array]:
        """(y, r); r is (..., 1) float32."""
        # In transformers' order of roundings, so that every bit is as there.
        wide = rounded(x, torch.float32)
        r = wide.square().mean(-1, keepdim=True).add_(self.eps).rsqrt_()
        normed = wide * r
        if self.gain.dtype == torch.float32:
            return rounded(normed.mul_(self.gain), x.dtype), r
        return rounded(normed, x.dtype).mul_(self.gain), r


def fuse_rms_norms(network: Any, dtype: torch.dtype) -> None:
    """Let the frozen RMS norms of a network be computed by one node each, those that are found to be just that.

    Args:
        network: transformers' model, on its device.
        dtype: what it computes in.
    """
    for module in network.modules():
        if type(module).__name__.endswith("RMSNorm") and not parametrize.is_parametrized(module):
            norm = _norm_of(module, dtype)
            if norm is not None:
                module.forward = norm


def _norm_of(module: Any, dtype: torch.dtype) -> RMSNorm | None:
    """The norm that gives every bit the module does, None if there is none."""
    weights = dict(module.named_parameters())
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if weights.keys() != {"weight"} or weights["weight"].ndim != 1 or not isinstance(eps, float):
        return None
    weight = weights["weight"].detach()
    sizes = torch.tensor(_SIZES, device=weight.device)[None, :, None]
    x = (sizes * torch.linspace(-1, 2, len(weight), device=weight.device)).to(dtype)
    for gain in (weight, weight.float(), 1.0 + weight.float()):
        norm = RMSNorm(gain, eps)
        if gives_the_bits_of(module, norm, x):
            return norm
    return None


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Array, norm: RMSNorm) -> Array:
        y, r = norm.of(x)
        ctx.gain = norm.gain
        ctx.save_for_backward(x, r)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Array) -> tuple[Array, None]:
        x, r = ctx.saved_tensors
        dx, normed = rounded(grads[0] * ctx.gain, torch.float32), rounded(x, torch.float32) * r
        dx.addcmul_(normed, (dx * normed).mean(-1, keepdim=True), value=-1).mul_(r)
        return rounded(dx, x.dtype), None


# Without the look for functorch's wrappers, as in _adapted.
_node = super(torch.autograd.Function, _RMSNorm).apply
