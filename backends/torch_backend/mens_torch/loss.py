"""Cross-entropy of the supervised positions, without ever holding all logits.

For a chunk of n positions with hidden states h (n, D), head W (V, D) and targets y::

    z = h Wᵀ          loss = Σ logsumexp(z) − z[y]          dloss/dh = (softmax(z) − onehot(y)) W
                                                            dloss/dW = (softmax(z) − onehot(y))ᵀ h

The gradients are formed while the chunk's logits are there, so at most chunk · V of them exist at a time and the
backward pass has nothing left to do. A head that is frozen gets none; that of one that is trained is summed over the
chunks in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor as Array

from mens_torch._heap import MAPPED, give_back_holes
from mens_torch._products import products

__all__ = ["supervised_loss"]

# Logits that go through the softmax together on a CPU, two mebibytes of float32: the passes over them then stay in a
# core's own cache. Sixteen rows of a vocabulary of 152,000 took the head 1.33 of its two products' time, these 1.15.
_IN_CACHE = 1 << 19


def supervised_loss(hidden: Array, head: Array, targets: Array, chunk: int = 256, *, trained: bool = False) -> Array:
    """Sum of the cross-entropies, in nats.

    Args:
        hidden: (S, D), the supervised positions' hidden states, in the base's format.
        head: (V, D), same format, or a float32 master that is rounded to it.
        targets: (S,) integer, each in 0 … V - 1.
        chunk: positions whose logits exist at the same time.
        trained: whether the head gets a gradient, too.

    Returns:
        () float32; log-sum-exp and the sum are taken in float32.
    """
    head = head if trained and torch.is_grad_enabled() else head.detach()
    total: Array = _ChunkedCrossEntropy.apply(hidden, head, targets, chunk)  # type: ignore[no-untyped-call]
    return total


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Array, master: Array, targets: Array, chunk: int) -> Array:
        head, by = master.to(hidden.dtype), products(hidden)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        of_head = torch.zeros_like(master) if ctx.needs_input_grad[1] else None
        rows = max(1, _IN_CACHE // len(head)) if hidden.device.type == "cpu" else chunk
        if hidden.device.type == "cpu" and min(chunk, len(hidden)) * len(head) * hidden.element_size() >= MAPPED:
            # Logits of that size lie beside the heap, and a run's highest demand is the two together.
            give_back_holes()
        # One buffer for all chunks, one for their softmax: fresh ones would cost more than what is written into them.
        buffer = hidden.new_empty(min(chunk, hidden.shape[0]), head.shape[0])
        room = buffer if buffer.dtype == torch.float32 else buffer[:rows].to(torch.float32)
        for start in range(0, hidden.shape[0], chunk):
            chosen = targets[start : start + chunk, None]
            scores = by.linear_into(buffer[: len(chosen)], hidden[start : start + chunk], head)
            for z, y in zip(torch.split(scores, rows), torch.split(chosen, rows), strict=True):
                total += _turn_into_slopes(z, y, room)
            if gradient is not None:
                gradient[start : start + chunk] = by.product(scores, head)
            if of_head is not None:
                _add_product(of_head, scores.t(), hidden[start : start + chunk])
        ctx.gradient, ctx.of_head = gradient, of_head
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Array) -> tuple[Array | None, Array | None, None, None]:
        gradient = None if ctx.gradient is None else grads[0].to(ctx.gradient.dtype) * ctx.gradient
        # In its own memory, which may be as large as all else.
        return gradient, None if ctx.of_head is None else ctx.of_head.mul_(grads[0]), None, None


def _add_product(total: Array, left: Array, right: Array) -> None:
    """Add a product, which like every other is computed in the format of its factors, to a sum in float32."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total.add_(products(left).product(left, right))


def _turn_into_slopes(scores: Array, chosen: Array, room: Array) -> Array:
    """Overwrite logits (n, V) with softmax - onehot; returns the sum of their cross-entropies at ``chosen`` (n, 1).

    Float32 logits are worked on where they are, others in ``room``, float32.
    """
    powers = scores if scores.dtype == torch.float32 else room[: len(scores)].copy_(scores)
    top, own = powers.amax(dim=-1, keepdim=True), powers.gather(1, chosen)
    mass = powers.sub_(top).exp_().sum(dim=-1, keepdim=True)
    scores.copy_(powers.div_(mass)).scatter_add_(1, chosen, scores.new_full(chosen.shape, -1.0))
    return (mass.log() + top - own).sum()
