"""Whether a module may be computed another way: it is tried."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor as Array

__all__ = ["gives_the_bits_of"]


def gives_the_bits_of(module: Any, forward: Callable[[Array], Array], x: Array) -> bool:
    """Whether ``forward`` gives every bit of the module's own, without a gradient.

    Args:
        module: one that takes more than one thing, or gives anything but one tensor, is not alike.
        forward: the other way.
        x: what both are tried on.
    """
    if len(inspect.signature(module.forward).parameters) != 1:
        return False
    with torch.no_grad():
        expected = module(x)
        if not isinstance(expected, Array):
            return False
        found = forward(x)
    return found.dtype == expected.dtype and torch.equal(found, expected)
