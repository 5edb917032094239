"""``status``: one look at a run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import mens_core
from mens_core import report

__all__ = ["add_arguments", "run"]

_DESCRIPTION = """\
Says how a run stands: its state, the step it has reached, loss, speed, time left, memory beside the plan's, held-out
losses, the last checkpoint and the guards. Of a run that died (its manifest says running, its process is gone) it says
so, and what to do. Ends with exit code 1 if the run died or failed. Writes nothing and takes no lock."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``status``."""
    parser.description = _DESCRIPTION
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print how the run stands; returns 0, or 1 if it died or failed.

    Raises:
        MensError: if the folder holds no run, or one that cannot be read.
    """
    found = mens_core.run_status(arguments.run_dir)
    report.say(json.dumps(found, indent=2) if arguments.json else report.status_text(found))
    return 1 if found["state"] in {"died", "failed"} else 0
