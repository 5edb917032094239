"""What JAX compiles a model's functions for."""

from __future__ import annotations

from collections.abc import Callable

import attrs
from flax import nnx
from jax import Array

from mens_jax._adamw import Numbers
from mens_jax.model import Model

__all__ = ["Structure"]


@attrs.frozen(cache_hash=True)
class Structure:
    """What is compiled in of a model; its arrays are apart, as JAX's transformations want them.

    Its hash, by which JAX finds what it has compiled, is taken once: that of a graph takes a tenth of a tiny step.

    Attributes:
        graph: the model without its arrays.
        unravel: the vector of what is trained to the model's state.
    """

    graph: nnx.GraphDef[Model]
    unravel: Callable[[Array], nnx.State]

    def model(self, frozen: nnx.State, adapter: Numbers) -> Model:
        """The model with its arrays."""
        state = nnx.merge_state(self.unravel(adapter.vector), adapter.tables)
        found: Model = nnx.merge(self.graph, state, frozen)
        return found
