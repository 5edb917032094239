"""Inputs of linears that are made again in the backward pass instead of kept (Chen et al. 2016, arXiv:1604.06174).

::

    x ─▶ norm ─▶ y ─▶ linear          the norm keeps x for its own backward pass; the linear, which needs y for
    │            ╎                    the slope of A, makes it from x again
    └─▶ ╌╌╌╌╌╌╌╌▶ y

That costs a pass over y where the products around it cost a hundred; a GELU costs two, by PyTorch's kernel for CPUs
twenty. In bfloat16, whose products are several times as fast, its output is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor as Array
from torch import nn

from mens_torch._activations import GELU

__all__ = ["Origin", "origin_of", "remember", "remember_outputs"]

# Numbers from which it is worth it: fewer take less memory than is noticed, and longer to make than to keep.
_MANY = 1 << 16


class Origin(NamedTuple):
    """What a tensor was made by, and from what; all of that is kept by others."""

    make: Callable[..., Array]
    tensors: tuple[Array, ...]


def remember_outputs(network: Any, dtype: torch.dtype) -> None:
    """Let the outputs of norms, and in float32 those of GELUs, say what they were made from.

    Args:
        network: transformers' model.
        dtype: what it computes in.
    """
    kinds = (nn.LayerNorm, nn.GELU, GELU) if dtype == torch.float32 else nn.LayerNorm
    for module in network.modules():
        if isinstance(module, kinds):
            module.register_forward_hook(_remember_output)


def remember(made: Array, origin: Origin) -> None:
    """Attach to a tensor, and to views of it, what it was made by, if it is large."""
    if made.requires_grad and made.numel() >= _MANY:
        made.mens_origin = made._version, origin  # type: ignore[attr-defined]  # noqa: SLF001


def origin_of(tensor: Array) -> Origin | None:
    """What was remembered of a tensor, or of the whole of what it is a view of, unless it was written into since."""
    base = tensor if tensor._base is None else tensor._base  # noqa: SLF001 (neither has a public reader)
    version, origin = getattr(base, "mens_origin", (None, None))
    if origin is None or version != base._version:  # noqa: SLF001
        return None
    whole = base.numel() == tensor.numel() and base.is_contiguous() and tensor.is_contiguous()
    return origin if tensor is base or whole else None


def _remember_output(module: Any, given: tuple[Any, ...], made: Array) -> None:
    # Empty where the input was handed over by name; it is then kept like any other.
    if given:
        remember(made, Origin(module.forward, given))
