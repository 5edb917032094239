"""AdamW on vectors, and all that it changes."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
import optax
from jax import Array

__all__ = ["Trained", "adamw"]

# Part of the hooks' contract.
_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-8


class Trained(NamedTuple):
    """What a step changes, each tensor's numbers end to end in one vector: XLA compiles one update, not dozens.

    Attributes:
        adapter: (P,) float32, A and B of every stack.
        exp_avg: (P,) float32, their first moments.
        exp_avg_sq: (P,) float32, their second moments.
        updates: () int32, how many were made.
    """

    adapter: Array
    exp_avg: Array
    exp_avg_sq: Array
    updates: Array


def adamw(trained: Trained, gradient: Array, learning_rate: Array, weight_decay: Array) -> Trained:
    """One update (Loshchilov & Hutter 2019, algorithm 2), as torch.optim.AdamW computes it.

    Args:
        trained: adapter and moments before.
        gradient: (P,) float32, clipped.
        learning_rate: () float32.
        weight_decay: () float32, decoupled.
    """
    adapter, updates = trained.adapter, trained.updates + 1
    exp_avg = optax.tree.update_moment(gradient, trained.exp_avg, _BETA1, 1)
    exp_avg_sq = optax.tree.update_moment(gradient, trained.exp_avg_sq, _BETA2, 2)
    # 1 - beta^updates. optax's own correction takes the difference in float32, which leaves five digits of it.
    correction1, correction2 = (-jnp.expm1(updates * jnp.float32(math.log(beta))) for beta in (_BETA1, _BETA2))
    direction = (exp_avg / correction1) / (jnp.sqrt(exp_avg_sq / correction2) + _EPSILON)
    return Trained(adapter - learning_rate * (direction + weight_decay * adapter), exp_avg, exp_avg_sq, updates)
