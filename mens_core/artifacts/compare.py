"""Two adapters beside each other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from mens_core.artifacts.adapters import open_adapter
from mens_core.artifacts.lora import LoraAdapter, LoraPair
from mens_core.artifacts.names import full_name
from mens_core.artifacts.norms import Distance, distance, update_norm
from mens_core.errors import ModelError

__all__ = ["compare_adapters"]


def compare_adapters(left: str | Path, right: str | Path) -> dict[str, Any]:
    """What two adapters have in common and what not, ready for JSON.

    Args:
        left: a run's folder, or any adapter that can be read.
        right: the other.

    Returns:
        ``only_left`` and ``only_right``, modules; ``modules``, module → norms and relative difference of what both
        update; ``relative_difference`` of all updates together, where a missing one is zero; ``whole_only_left``,
        ``whole_only_right`` and ``whole_differing``, tensors trained whole.

    Raises:
        ModelError: if one cannot be read, or a module or a whole tensor has another shape in the two.
    """
    one, other = open_adapter(Path(left)), open_adapter(Path(right))
    ours, theirs = _by_module(one), _by_module(other)
    shared: dict[str, Distance] = {}
    for module, pair in ours.items():
        if module in theirs:
            _check_shapes(module, pair.shape, theirs[module].shape, one, other)
            shared[module] = distance(pair, theirs[module])
    alone_left = {module: update_norm(pair) for module, pair in ours.items() if module not in theirs}
    alone_right = {module: update_norm(pair) for module, pair in theirs.items() if module not in ours}
    total = Distance(
        left=math.hypot(*alone_left.values(), *(both.left for both in shared.values())),
        right=math.hypot(*alone_right.values(), *(both.right for both in shared.values())),
        difference=math.hypot(
            *alone_left.values(), *alone_right.values(), *(both.difference for both in shared.values())
        ),
    )
    return {
        "left": str(left),
        "right": str(right),
        "only_left": list(alone_left),
        "only_right": list(alone_right),
        "modules": {module: attrs.asdict(both) | {"relative": both.relative} for module, both in shared.items()},
        "norm_left": total.left,
        "norm_right": total.right,
        "relative_difference": total.relative,
        **_compare_whole(one, other),
    }


def _compare_whole(left: LoraAdapter, right: LoraAdapter) -> dict[str, Any]:
    ours, theirs = _by_name(left.whole), _by_name(right.whole)
    differing = []
    for name in ours:
        if name in theirs:
            _check_shapes(name, ours[name].shape, theirs[name].shape, left, right)
            differing += [] if np.array_equal(ours[name], theirs[name]) else [name]
    return {
        "whole_only_left": [name for name in ours if name not in theirs],
        "whole_only_right": [name for name in theirs if name not in ours],
        "whole_differing": differing,
    }


def _check_shapes(
    name: str, ours: tuple[int, ...], theirs: tuple[int, ...], left: LoraAdapter, right: LoraAdapter
) -> None:
    if ours != theirs:
        raise ModelError(
            f"{name} has shape {ours} in one and {theirs} in the other",
            where=f"{left.source} and {right.source}",
            expected="adapters of one base",
        )


def _by_module(adapter: LoraAdapter) -> dict[str, LoraPair]:
    return {full_name(module): pair for module, pair in zip(adapter.modules, adapter.pairs.values(), strict=True)}


def _by_name(whole: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    return {full_name(name): tensor for name, tensor in whole.items()}
