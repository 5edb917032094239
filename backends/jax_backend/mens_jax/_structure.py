"""What JAX compiles a model's functions for."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import attrs
import jax
import numpy as np
from flax import nnx
from jax import Array, lax
from jax.tree_util import PyTreeDef

from mens_jax._adamw import Numbers
from mens_jax.model import Model

__all__ = ["Structure"]


@attrs.frozen(cache_hash=True)
class Structure:
    """What is compiled in of a model; its arrays are apart, as JAX's transformations want them.

    Its hash, by which JAX finds what it has compiled, is taken once: that of a graph takes a tenth of a tiny step.

    Attributes:
        graph: the model without its arrays.
        tree: the state of what lies end to end in the vector of what is trained.
        shapes: of its arrays, in their order.
    """

    graph: nnx.GraphDef[Model]
    tree: PyTreeDef
    shapes: tuple[tuple[int, ...], ...]

    def unravel(self, vector: Any) -> nnx.State:
        """The state whose arrays lie end to end in a vector; of a vector on the host they are views.

        Args:
            vector: (P,), JAX's or NumPy's.
        """
        sizes = [math.prod(shape) for shape in self.shapes]
        if isinstance(vector, Array):
            parts: Sequence[Any] = lax.split(vector, sizes)
        else:
            parts = np.split(vector, list(itertools.accumulate(sizes))[:-1])
        arrays: list[Any] = [part.reshape(shape) for part, shape in zip(parts, self.shapes, strict=True)]
        found: nnx.State = jax.tree.unflatten(self.tree, arrays)
        return found

    def model(self, frozen: nnx.State, adapter: Numbers) -> Model:
        """The model with its arrays."""
        state = nnx.merge_state(self.unravel(adapter.vector), adapter.tables)
        found: Model = nnx.merge(self.graph, state, frozen)
        return found
