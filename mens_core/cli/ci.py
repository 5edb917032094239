"""``ci``: the gate under the name by which the runbook calls it, ``ci mens-gate``."""

from __future__ import annotations

import argparse

from mens_core.cli import gate
from mens_core.cli.sub_verbs import add_sub_verbs, run_sub_verb

__all__ = ["add_arguments", "run"]

_VERBS = {"mens-gate": ("run the acceptance runbook, as gate does", gate)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the sub-verbs of ``ci``."""
    add_sub_verbs(parser, _VERBS)


def run(arguments: argparse.Namespace) -> int:
    """Run a sub-verb; returns its exit code.

    Raises:
        MensError: as the sub-verb does.
    """
    return run_sub_verb(arguments)
