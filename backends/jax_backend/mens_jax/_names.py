"""Names of single layers and of the stacks that hold them."""

from __future__ import annotations

import re

__all__ = ["stacked_name"]

_LAYER = re.compile(r"^(model\.layers|transformer\.h)\.(\d+)\.")


def stacked_name(name: str) -> tuple[str, int | None]:
    """``model.layers.3.mlp.up_proj`` to (``model.layers.mlp.up_proj``, 3); (name, None) outside the layers."""
    found = _LAYER.match(name)
    return (f"{found[1]}.{name[found.end() :]}", int(found[2])) if found else (name, None)
