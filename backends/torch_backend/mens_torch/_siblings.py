"""Linears that read one tensor, as q, k and v do: one node of the graph for all of them.

::

          ┌─▶ q      the first that is called computes all, the others find theirs ready: the slope of x is summed
     x ───┼─▶ k      where it lies, and an x that is made again is made once
          └─▶ v

Which they are is not guessed from names: a trial run shows which are called with the very same tensor.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING, Any

from torch import Tensor as Array

from mens_torch._adapted import adapted

if TYPE_CHECKING:
    from mens_torch.lora import LoraLinear

__all__ = ["Siblings", "joined"]


class Siblings:
    """Layers that are called with one tensor, each once.

    Args:
        layers: two or more, of one scale.
    """

    def __init__(self, layers: tuple[LoraLinear, ...]) -> None:
        # Weakly, since each of them holds this: a model that is let go is freed at once, its circles only some day.
        self._layers = tuple(weakref.ref(layer) for layer in layers)
        self._given: tuple[Array, int] | None = None
        self._ready: dict[LoraLinear, Array] = {}

    @property
    def layers(self) -> tuple[LoraLinear, ...]:
        """Those that are there, all of them as long as their model is."""
        return tuple(layer for layer in (reference() for reference in self._layers) if layer is not None)

    def output(self, layer: LoraLinear, x: Array) -> Array:
        """Of one of them: made with that of the first, unless x is another tensor now or was written into."""
        given = self._given
        if given is None or given[0] is not x or given[1] != x._version or layer not in self._ready:  # noqa: SLF001
            # What nobody took goes first, and if this fails nothing is left that could be taken for it.
            self._given, self._ready = None, {}
            layers = self.layers
            outputs = adapted(x, [sibling.parts() for sibling in layers], layer.scale, None)
            self._given = x, x._version  # noqa: SLF001 (it has no public reader)
            self._ready = dict(zip(layers, outputs, strict=True))
        y = self._ready.pop(layer)
        if not self._ready:
            self._given = None
        return y


@contextmanager
def joined(layers: Iterable[LoraLinear]) -> Iterator[None]:
    """Make siblings of those that meanwhile are called once each, one after the other, with the very same tensor."""
    # The tensors are held, so that none of them takes another's place in memory.
    calls: list[tuple[LoraLinear, Array]] = []

    def note(layer: Any, given: tuple[Any, ...]) -> None:
        calls.extend((layer, x) for x in given)

    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    often = [layer for layer, _ in calls]
    for _, group in groupby(calls, lambda call: id(call[1])):
        together = tuple(layer for layer, _ in group)
        alike = len({layer.scale for layer in together}) == 1
        if len(together) > 1 and alike and all(often.count(layer) == 1 for layer in together):
            siblings = Siblings(together)
            for layer in together:
                layer.siblings = siblings
