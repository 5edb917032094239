"""``watch``: a run followed from another terminal."""

from __future__ import annotations

import argparse
from pathlib import Path

import mens_core
from mens_core import report
from mens_core.training_view import TrainingView

__all__ = ["add_arguments", "run"]

_DESCRIPTION = """\
Shows a run as its own terminal shows it, from what it writes to telemetry.jsonl, until it ends; then how it stands. A
run that has not made its folder yet is waited for. Ctrl-C ends watching, not the run.

Exit codes: 0 the run is complete, 1 it failed or died, 130 it was interrupted, or watching was."""

_CODES = {"complete": 0, "interrupted": 130}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``watch``."""
    parser.description = _DESCRIPTION
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="folder of a run")


def run(arguments: argparse.Namespace) -> int:
    """Follow the run; returns the exit code of its end.

    Raises:
        MensError: if the run cannot be read.
    """
    if not arguments.run_dir.exists():
        report.say(f"there is no {arguments.run_dir} yet; waiting for a run there")
    try:
        with TrainingView() as view:
            for event in mens_core.follow_run(arguments.run_dir):
                view.observe(event)
    except KeyboardInterrupt:
        report.complain("no longer watching; the run goes on without")
        return 130
    found = mens_core.run_status(arguments.run_dir)
    report.say(report.status_text(found))
    return _CODES.get(found["state"], 1)
