"""An adapter in numbers, whatever its format."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import attrs

from mens_core.artifacts.adapters import open_adapter
from mens_core.artifacts.names import within_block
from mens_core.artifacts.norms import update_norm

__all__ = ["describe_adapter"]


def describe_adapter(path: str | Path, meta: str | Path | None = None) -> dict[str, Any]:
    """What an adapter is, ready for JSON.

    Args:
        path: a run's folder, or any adapter that can be read.
        meta: description of an adapter of version 2 or 3.

    Returns:
        ``format``, ``method`` and ``base_model`` (None where the files do not say), ``nf4``, ``modules``,
        ``parameters`` of the pairs, ``whole`` tensor → shape, ``targets`` path inside a block → how many,
        ``ranks`` and ``scales`` (distinct, ascending), ``norm`` of all updates together, and ``updates``: module →
        rank, scale, shape (out, in) and norm ‖s B A‖.

    Raises:
        ModelError: if it cannot be read.
    """
    adapter = open_adapter(Path(path), Path(meta) if meta else None)
    pairs = dict(zip(adapter.modules, adapter.pairs.values(), strict=True))
    norms = {module: update_norm(pair) for module, pair in pairs.items()}
    return {
        "path": str(adapter.source),
        "format": adapter.kind,
        "method": adapter.method,
        "base_model": adapter.base_model,
        "nf4": attrs.asdict(adapter.nf4) if adapter.nf4 else None,
        "modules": len(pairs),
        "parameters": sum(pair.a.size + pair.b.size for pair in pairs.values()),
        "whole": {name: list(tensor.shape) for name, tensor in adapter.whole.items()},
        "targets": dict(Counter(map(within_block, pairs))),
        "ranks": sorted({pair.rank for pair in pairs.values()}),
        "scales": sorted({pair.scale for pair in pairs.values()}),
        "norm": math.hypot(*norms.values()),
        "updates": {
            module: {"rank": pair.rank, "scale": pair.scale, "shape": list(pair.shape), "norm": norms[module]}
            for module, pair in pairs.items()
        },
    }
