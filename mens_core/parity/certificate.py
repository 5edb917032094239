"""parity.json: the comparisons of all models, with the versions and the machine they were made on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs

from mens_core.artifacts.manifest import installed_versions, utc_now
from mens_core.machine import this_machine

__all__ = ["SCHEMA", "certificate"]

SCHEMA = "mens.parity.v1"


def certificate(models: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Put the parts of a certificate together.

    Args:
        models: from ``kernels.compare_kernels``.

    Returns:
        Ready for JSON; ``passed`` is the verdict of all comparisons.
    """
    machine = attrs.asdict(this_machine())
    machine.pop("speeds")
    return {
        "schema": SCHEMA,
        "created_at": utc_now(),
        "passed": all(model["passed"] for model in models),
        "comparisons": sum(len(model["comparisons"]) for model in models),
        "failed": sum(not found["passed"] for model in models for found in model["comparisons"]),
        "versions": installed_versions(),
        "machine": machine,
        "models": list(models),
    }
