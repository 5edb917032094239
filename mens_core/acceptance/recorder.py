"""A pytest plugin for the gate's child processes: counts what ran, and keeps the numbers that tests recorded.

Loaded by ``-p mens_core.acceptance.recorder``; writes to the file that the environment names when the session ends.
A session that dies leaves no file, which the gate sees.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

__all__ = [
    "RECORD",
    "pytest_collection_finish",
    "pytest_collectreport",
    "pytest_runtest_logreport",
    "pytest_sessionfinish",
]

#: The environment variable that names the file.
RECORD = "MENS_GATE_RECORD"

_outcomes: dict[str, str] = {}
_measured: dict[str, dict[str, Any]] = {}
_reasons: list[str] = []
_counts: Counter[str] = Counter()


def pytest_collection_finish(session: Any) -> None:
    """Count the tests that will run."""
    _counts["collected"] = len(session.items)


def pytest_collectreport(report: Any) -> None:
    """Count a file that is skipped or broken as a whole."""
    if report.outcome != "passed":
        _counts[report.outcome] += 1
        _reasons.append(f"{report.nodeid}: {report.outcome} as a whole")


def pytest_runtest_logreport(report: Any) -> None:
    """Keep the worst of a test's phases; one that is expected to fail, and does, counts as skipped."""
    if hasattr(report, "wasxfail"):
        # One that passes although it was expected to fail shows as little as one that failed as expected.
        report.outcome = "skipped"
    tells = report.outcome != "passed" or report.when == "call"
    if tells and (report.outcome == "failed" or _outcomes.get(report.nodeid) != "failed"):
        _outcomes[report.nodeid] = report.outcome
    if report.outcome != "passed":
        _reasons.append(f"{report.nodeid}: {report.outcome}")
    if report.when == "call" and report.user_properties:
        _measured[report.nodeid.rpartition("::")[2]] = dict(report.user_properties)


def pytest_sessionfinish() -> None:
    """Write the record."""
    counts = Counter(_outcomes.values()) + _counts
    record = {name: counts[name] for name in ("collected", "passed", "failed", "skipped")}
    text = json.dumps(record | {"measured": _measured, "reasons": _reasons})
    Path(os.environ[RECORD]).write_text(text, encoding="utf-8")
