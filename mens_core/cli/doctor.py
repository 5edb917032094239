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
    parser.add_argument(
        "--measure",
        action="store_true",
        help="first run a few steps of small random models with every kernel, half a minute each, and keep how fast "
        "they were: plans then tell the time from that instead of from a table",
    )


def run(arguments: argparse.Namespace) -> int:
    """Print what was found; 2 if no kernel can run."""
    if arguments.measure:
        for kernel, speed in mens_core.measure_speeds():
            report.complain(f"{kernel}: {speed.source}")
    found = mens_core.examine()
    report.say(json.dumps(found, indent=2) if arguments.json else report.doctor_text(found))
    return 0 if any(kernel["ready"] for kernel in found["kernels"].values()) else 2
