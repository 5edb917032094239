"""Names of single layers and of the stacks that hold them."""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["BLOCKS", "stacked_name", "stacks_of"]

BLOCKS = ("model.layers.", "transformer.h.")
"""How names of what is in the stacked blocks begin."""

_LAYER = re.compile(r"^(model\.layers|transformer\.h)\.(\d+)\.")


def stacked_name(name: str) -> tuple[str, int | None]:
    """``model.layers.3.mlp.up_proj`` to (``model.layers.mlp.up_proj``, 3); (name, None) outside the layers."""
    found = _LAYER.match(name)
    return (f"{found[1]}.{name[found.end() :]}", int(found[2])) if found else (name, None)


def stacks_of(paths: Iterable[str]) -> dict[str, dict[int, str]]:
    """Stacked name → number of a layer → that layer's own path, for those layers that are among ``paths``."""
    stacks: dict[str, dict[int, str]] = {}
    for path in paths:
        stack, layer = stacked_name(path)
        stacks.setdefault(stack, {})[layer or 0] = path
    return stacks
