"""Layers that are computed again in the backward pass instead of kept (Chen et al. 2016, arXiv:1604.06174).

transformers' own switch asks whether a model is in training mode, which this base never is. It marks the layers that
may be computed again, though: those that are ``GradientCheckpointingLayer``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from mens_core.errors import ModelError
from mens_torch.dropout import Dropout
from mens_torch.lora import LoraLinear

__all__ = ["checkpoint_layers", "layers_of"]


def layers_of(network: Any) -> list[Any]:
    """The layers that may be computed again, none of them within another."""
    found: list[Any] = []
    inside: set[Any] = set()
    for module in network.modules():
        if isinstance(module, GradientCheckpointingLayer) and module not in inside:
            found.append(module)
            inside.update(module.modules())
    return found


def checkpoint_layers(network: Any) -> None:
    """Let every layer keep what goes into it, and be computed again from that in the backward pass.

    Args:
        network: transformers' model with its adapter in place.

    Raises:
        ModelError: if it has no layer that may be computed again.
    """
    layers = layers_of(network)
    if not layers:
        raise ModelError(
            f"{type(network).__name__} has no layers that could be computed again",
            expected="layers of transformers' type GradientCheckpointingLayer",
            fix="gradient_checkpointing: false, with smaller or shorter batches",
        )
    for layer in layers:
        linears = [module for module in layer.modules() if isinstance(module, LoraLinear)]
        layer.forward = functools.partial(_run, linears, layer.forward)


def _run(linears: list[LoraLinear], forward: Callable[..., Any], *given: Any, **named: Any) -> Any:
    """What the layer's own ``forward`` gives; where nothing is trained, by that alone."""
    if not torch.is_grad_enabled():
        return forward(*given, **named)
    # No layer draws from PyTorch's own generators, so there is no state of theirs to keep.
    contexts = functools.partial(_contexts, linears)
    return checkpoint(forward, *given, use_reentrant=False, preserve_rng_state=False, context_fn=contexts, **named)


def _contexts(linears: list[LoraLinear]) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """What the first computation runs in, and the second: under the masks that the first is about to draw."""
    return nullcontext(), _dropping([(linear, linear.dropout) for linear in linears])


@contextmanager
def _dropping(then: list[tuple[LoraLinear, Dropout | None]]) -> Iterator[None]:
    """Give linears the dropout of then, and afterwards, however the computation ends, what they have now."""
    now = [(linear, linear.dropout) for linear, _ in then]
    for linear, dropout in then:
        linear.dropout = dropout
    try:
        yield
    finally:
        for linear, dropout in now:
            linear.dropout = dropout
