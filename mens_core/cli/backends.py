"""``backends``: what is installed, what is missing, and the line that brings it; imports none of them."""

from __future__ import annotations

import argparse

import mens_core
from mens_core import report

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``backends`` takes no flags of its own."""
    parser.epilog = "A backend is an entry point of the group mens_core.backends in any installed distribution."


def run(_arguments: argparse.Namespace) -> int:
    """Print the table."""
    rows = [
        (
            info.name,
            f"{info.distribution} {info.version}",
            f"missing {', '.join(info.missing)}: {info.install}" if info.missing else "ready",
        )
        for info in mens_core.installed_backends()
    ]
    report.say(report.table(("backend", "distribution", "state"), rows))
    return 0
