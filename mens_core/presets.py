"""Named settings, as the older system's training presets had them; explicit fields win over a preset.

A preset sets rank, alpha, row length, batch, accumulation, epochs, warm-up and learning rate; ``mobile_edge`` also
sets what its deployment target demands.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from mens_core.errors import ContractError

__all__ = ["ALIASES", "PRESETS", "preset_fields"]

_COLUMNS = ("rank", "alpha", "seq_len", "batch_size", "grad_accum", "epochs", "warmup_steps", "learning_rate")

_TABLE: dict[str, tuple[float, ...]] = {
    "tiny": (4, 8.0, 128, 1, 1, 1, 10, 1e-4),
    "safe": (8, 16.0, 256, 2, 8, 3, 50, 2e-4),
    "4080": (16, 32.0, 384, 1, 8, 3, 80, 1.5e-4),
    "a100": (32, 64.0, 1024, 8, 2, 3, 200, 2e-4),
    "vox-gen": (16, 32.0, 256, 2, 8, 5, 60, 1.5e-4),
    "mobile_edge": (8, 16.0, 256, 1, 8, 3, 40, 1.5e-4),
}

PRESETS: Mapping[str, Mapping[str, Any]] = {
    name: dict(zip(_COLUMNS, row, strict=True))
    | ({"deployment_target": "mobile_edge", "device": "cpu"} if name == "mobile_edge" else {})
    for name, row in _TABLE.items()
}

ALIASES = {
    "4080_safe": "safe",
    "small_8g": "safe",
    "qwen_small_8g": "safe",
    "default": "4080",
    "3090": "4080",
    "qwen_4080_16g": "4080",
    "qwen_rtx3090_24g": "4080",
    "a100_80g": "a100",
    "qwen_a100_80g": "a100",
}
"""Further names of the older system → preset."""


def preset_fields(name: str) -> dict[str, Any]:
    """The fields a preset sets.

    Raises:
        ContractError: if there is no such preset, naming the nearest.
    """
    own = ALIASES.get(name, name)
    if own == "distributed":
        raise ContractError("there is no preset 'distributed': a run uses one device", fix="--preset a100")
    if own not in PRESETS:
        close = difflib.get_close_matches(name, [*PRESETS, *ALIASES], n=1)
        raise ContractError(
            f"there is no preset {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""),
            expected=f"one of {', '.join(PRESETS)}",
            fix="python -m mens_core presets",
        )
    return dict(PRESETS[own])
