"""The learning rate: the core's schedules against the specification's."""

from __future__ import annotations

from collections.abc import Iterator

import attrs
import numpy as np

from mens_core.parity.bounds import SCHEDULE
from mens_core.parity.comparison import Comparison, apart
from mens_core.testing.oracle import scheduled_rate
from mens_core.training.schedule import learning_rate

__all__ = ["compare_schedules"]

_TOTAL, _PEAK = 37, 2e-4


def compare_schedules() -> Iterator[Comparison]:
    """Every step of each schedule, without and with warm-up."""
    for schedule in ("constant", "linear", "cosine"):
        for warmup in (0, 1, 5):
            found, expected = (
                np.array(
                    [
                        function(step, schedule=schedule, peak=_PEAK, warmup_steps=warmup, total_steps=_TOTAL)
                        for step in range(_TOTAL)
                    ]
                )
                for function in (learning_rate, scheduled_rate)
            )
            what = f"learning rate, {schedule}, {warmup} steps of warm-up"
            # Roundings of float32 would say nothing of numbers in float64.
            compared = apart(what, ("core", found), ("oracle", expected), SCHEDULE, _PEAK)
            yield attrs.evolve(compared, ulps=None)
