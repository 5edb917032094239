"""``doctor``: what is here, which kernels can run, and what is missing for the others."""

from __future__ import annotations

import argparse
import json

import mens_core
from mens_core import report

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``doctor``."""
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print what was found; 2 if no kernel can run."""
    found = mens_core.examine()
    report.say(json.dumps(found, indent=2) if arguments.json else report.doctor_text(found))
    return 0 if any(kernel["ready"] for kernel in found["kernels"].values()) else 2
