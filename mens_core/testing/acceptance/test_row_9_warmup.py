"""Row 9: the warm-up's sequence, and the schedules of torch and optax beside it."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from mens_core.training.schedule import learning_rate


def test_linear_warmup_sequence_matches(record_property: Any) -> None:
    """The runbook's sequence: from 0.01 to 0.05 in four steps, then constant."""
    torch, optax = map(importlib.import_module, ("torch", "optax"))
    first, last, warmup = 0.01, 0.05, 4
    rise = [learning_rate(k, schedule="constant", peak=1.0, warmup_steps=warmup, total_steps=6) for k in range(6)]
    found = [first + (last - first) * share for share in rise]
    expected = [0.01, 0.02, 0.03, 0.04, 0.05, 0.05]
    record_property("largest error", max(abs(a - b) for a, b in zip(found, expected, strict=True)))
    assert found == pytest.approx(expected, abs=1e-12)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=last)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=first / last, total_iters=warmup)
    for step, rate in enumerate(found):
        assert rate == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
        # optax computes in float32
        assert rate == pytest.approx(float(optax.linear_schedule(first, last, warmup)(step)), abs=1e-8)
        optimizer.step()
        scheduler.step()
    off_by_one = [first + (last - first) * share for share in [*rise[1:], 1.0]]
    assert off_by_one != pytest.approx(found, abs=1e-12)
