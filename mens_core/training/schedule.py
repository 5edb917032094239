"""The learning rate as a pure function of the step.

    warm-up: peak · step / warmup                for step < warmup
    constant: peak      linear: peak · (1 - p)      cosine: peak · ½ (1 + cos π p)

with p = (step - warmup) / (total - warmup) from 0 to 1. The first update uses step 0. These are transformers'
schedules of the same names (``get_scheduler``, optimization.py).
"""

from __future__ import annotations

import math

__all__ = ["learning_rate", "warmup_for"]

_WARMUP_SHARE = 0.03  # Dettmers et al. 2023, appendix B.2


def warmup_for(total_steps: int, requested: int | None) -> int:
    """Warm-up steps: those asked for, at most the whole run, or 3 % of it rounded down."""
    if requested is None:
        # Rounded down, because a run of a few steps must not spend one of them at a rate of zero.
        return math.floor(_WARMUP_SHARE * total_steps)
    return min(requested, total_steps)


def learning_rate(step: int, *, schedule: str, peak: float, warmup_steps: int, total_steps: int) -> float:
    """The rate of one optimizer step.

    Args:
        step: 0 for the first update, below ``total_steps``.
        schedule: ``constant``, ``linear`` or ``cosine``.
        peak: the highest rate.
        warmup_steps: steps until the peak is reached, 0 for none.
        total_steps: steps of the whole run.

    Raises:
        ValueError: if the schedule is not one of the three.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    match schedule:
        case "constant":
            return peak
        case "linear":
            return peak * (1.0 - progress)
        case "cosine":
            return peak * 0.5 * (1.0 + math.cos(math.pi * progress))
    raise ValueError(f"unknown schedule {schedule!r}")
