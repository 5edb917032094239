"""AdamW on few and large arrays, and all that it changes."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

__all__ = ["Numbers", "Trained", "adamw"]

# Part of the hooks' contract.
_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-8


class Numbers(NamedTuple):
    """A number for each that is trained: XLA compiles an update for few arrays, not for dozens.

    Attributes:
        vector: (P,) float32, A and B of every stack and the norms that are trained, end to end.
        tables: embeddings and the head as far as they are trained, (V, D) float32 each.
    """

    vector: Array
    tables: nnx.State


class Trained(NamedTuple):
    """What a step changes.

    Attributes:
        adapter: what is trained.
        exp_avg: its first moments.
        exp_avg_sq: its second moments.
        updates: () int32, how many were made.
    """

    adapter: Numbers
    exp_avg: Numbers
    exp_avg_sq: Numbers
    updates: Array


def adamw(trained: Trained, gradient: Numbers, learning_rate: Array, weight_decay: Array) -> Trained:
    """One update (Loshchilov & Hutter 2019, algorithm 2), as torch.optim.AdamW computes it.

    Args:
        trained: adapter and moments before.
        gradient: clipped.
        learning_rate: () float32.
        weight_decay: () float32, decoupled.
    """
    updates = trained.updates + 1
    exp_avg = optax.tree.update_moment(gradient, trained.exp_avg, _BETA1, 1)
    exp_avg_sq = optax.tree.update_moment(gradient, trained.exp_avg_sq, _BETA2, 2)
    # 1 - beta^updates. optax's own correction takes the difference in float32, which leaves five digits of it.
    correction1, correction2 = (-jnp.expm1(updates * jnp.float32(math.log(beta))) for beta in (_BETA1, _BETA2))

    def moved(old: Array, first: Array, second: Array) -> Array:
        direction = (first / correction1) / (jnp.sqrt(second / correction2) + _EPSILON)
        return old - learning_rate * (direction + weight_decay * old)

    adapter = jax.tree.map(moved, trained.adapter, exp_avg, exp_avg_sq)
    return Trained(adapter, exp_avg, exp_avg_sq, updates)
