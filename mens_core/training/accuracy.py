"""What the plan expected beside what the run measured."""

from __future__ import annotations

from typing import Any

from mens_core.plan import ExecutionPlan

__all__ = ["beside_measured"]


def beside_measured(
    plan: ExecutionPlan, *, peak_memory_bytes: int, seconds_per_step: float, tokens_per_step: float
) -> dict[str, Any]:
    """Compare.

    Args:
        plan: with its estimate.
        peak_memory_bytes: highest resident size of the process; it is compared only on a CPU, where that is what the
            estimate means.
        seconds_per_step: median of the run's steps, so that those which waited for a compilation do not count.
        tokens_per_step: mean of the run's steps.

    Returns:
        Name of the estimate → estimated, measured, and the error (measured / estimated - 1); None for what is not
        known.
    """
    estimate = plan.estimate()
    measured = {
        "peak_memory_bytes": peak_memory_bytes if plan.device == "cpu" else None,
        "seconds_per_step": seconds_per_step,
        "tokens_per_sec": tokens_per_step / seconds_per_step,
    }
    return {
        name: {"estimated": estimate[name], "measured": found, "error": _error(estimate[name], found)}
        for name, found in measured.items()
    }


def _error(estimated: float | None, measured: float | None) -> float | None:
    return None if estimated is None or measured is None else measured / estimated - 1
