"""Named settings, as the older system's training presets had them; explicit fields win over a preset.

A preset sets rank, alpha, row length, batch, accumulation, epochs, warm-up and learning rate, nothing else.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from mens_core.errors import ContractError

__all__ = ["PRESETS", "preset_fields"]

_COLUMNS = ("rank", "alpha", "seq_len", "batch_size", "grad_accum", "epochs", "warmup_steps", "learning_rate")

_TABLE: dict[str, tuple[float, ...]] = {
    "tiny": (4, 8.0, 128, 1, 1, 1, 10, 1e-4),
    "safe": (8, 16.0, 256, 2, 8, 3, 50, 2e-4),
    "4080": (16, 32.0, 384, 1, 8, 3, 80, 1.5e-4),
    "a100": (32, 64.0, 1024, 8, 2, 3, 200, 2e-4),
    "mobile_edge": (8, 16.0, 256, 1, 8, 3, 40, 1.5e-4),
}

PRESETS: Mapping[str, Mapping[str, Any]] = {name: dict(zip(_COLUMNS, row, strict=True)) for name, row in _TABLE.items()}


def preset_fields(name: str) -> dict[str, Any]:
    """The fields a preset sets.

    Raises:
        ContractError: if there is no such preset, naming the nearest.
    """
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, n=1)
        raise ContractError(
            f"there is no preset {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""),
            expected=f"one of {', '.join(PRESETS)}",
        )
    return dict(PRESETS[name])
