"""The learning rate of a step, as a rise to the peak times a fall from it."""

from __future__ import annotations

import math

__all__ = ["scheduled_rate"]


def scheduled_rate(step: int, *, schedule: str, peak: float, warmup_steps: int, total_steps: int) -> float:
    """The rate of one optimizer step: transformers' schedules of the same names.

    The cosine is written as cos²(πp / 2), which is ½ (1 + cos πp), so that it shares no rounding with the core's.

    Args:
        step: 0 for the first update.
        schedule: ``constant``, ``linear`` or ``cosine``.
        peak: the highest rate.
        warmup_steps: steps until the peak is reached, 0 for none.
        total_steps: steps of the whole run.
    """
    if step < warmup_steps:
        return peak * (step / warmup_steps)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    falls = {"constant": 1.0, "linear": 1.0 - progress, "cosine": math.cos(0.5 * math.pi * progress) ** 2}
    return peak * falls[schedule]
