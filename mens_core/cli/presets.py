"""``presets``: the named settings and what they set."""

from __future__ import annotations

import argparse

from mens_core import report
from mens_core.presets import ALIASES, PRESETS

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``presets``."""
    parser.add_argument("--list", action="store_true", help="print the names alone, one a line")


def run(arguments: argparse.Namespace) -> int:
    """Print the table, or the names."""
    if arguments.list:
        report.say("\n".join([*PRESETS, *ALIASES]))
        return 0
    columns = list(PRESETS["tiny"])
    also = {name: ", ".join(alias for alias, own in ALIASES.items() if own == name) for name in PRESETS}
    rows = [(name, *(f"{fields[column]:g}" for column in columns), also[name]) for name, fields in PRESETS.items()]
    report.say(report.table(("preset", *columns, "also called"), rows))
    report.say("mobile_edge also sets deployment_target mobile_edge and device cpu")
    return 0
