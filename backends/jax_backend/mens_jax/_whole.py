"""Tensors of the base that are no linear's, and their float32 masters where they are trained whole.

::

    master, float32, trained ──rounded to the run's format──▶ what the module computes with, as the base did

At the start the master is what the run holds of the base, so that rounding changes nothing. A tied module gets a master
of its own and leaves the other as it was, as PEFT's ``modules_to_save`` do.
"""

from __future__ import annotations

from collections.abc import Container
from typing import cast

import jax.numpy as jnp
from flax import nnx
from jax import Array

__all__ = ["Dense", "Table"]


class Table(nnx.Variable[Array]):
    """The master of an embedding or of the head: no part of the vector of all that is trained, which would copy it."""


class Dense(nnx.Module):
    """A tensor of the base, stacked or not.

    Args:
        tensor: in the run's format.
        trained: of a stack, the layers whose tensor is trained; of another tensor, 0 if it is. A stack of which only
            some are has both, the base's and a master of every layer.
    """

    def __init__(self, tensor: Array, trained: Container[int] = (), layers: int = 1) -> None:
        self.dtype = tensor.dtype
        which = [layer in trained for layer in range(layers)]
        kind = Table if tensor.ndim > 1 and layers == 1 else nnx.LoRAParam
        # A copy of its own, since a step writes its result into the same memory.
        self.master = kind(jnp.array(tensor, jnp.float32)) if any(which) else None
        self.frozen = None if all(which) else nnx.Param(tensor)
        self.which = nnx.Variable(jnp.array(which)) if any(which) and not all(which) else None

    @property
    def trained(self) -> bool:
        """Whether there is a master and nothing else."""
        return self.frozen is None

    @property
    def source(self) -> Array:
        """The master where it is all there is, or what the base has."""
        found = self.master if self.frozen is None else self.frozen
        return cast("Array", cast("nnx.Variable[Array]", found).get_value())

    def __call__(self) -> Array:
        """In the run's format."""
        if self.master is None or self.which is None:
            return self.source.astype(self.dtype)
        return jnp.where(self.which.get_value(), self.master.get_value().astype(self.dtype), self.source)
