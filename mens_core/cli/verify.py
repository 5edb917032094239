"""``verify``: whether all that a run's manifest says still holds."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import mens_core
from mens_core import report
from mens_core.errors import printable

__all__ = ["add_arguments", "run"]

_DESCRIPTION = """\
Rechecks what the manifest of a run holds: the hashes of the base, the tokenizer, the chat template, the rows and the
run's own files, and that contract, kernel, rank and scale are what it says. Lists each as ok, changed or missing, and
ends with exit code 1 if one is not ok."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``verify``."""
    parser.description = _DESCRIPTION
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print every check; returns 0 if all hold and 1 if not.

    Raises:
        ModelError: if the folder holds no manifest of a run.
    """
    found = mens_core.verify_run(arguments.run_dir)
    rows = [tuple(printable(check[name]) for name in ("state", "what", "detail")) for check in found["checks"]]
    broken = sum(check["state"] != "ok" for check in found["checks"])
    verdict = f"{len(rows)} checks, {f'{broken} do not hold' if broken else 'all hold'}"
    text = f"{report.table(('state', 'what', 'detail'), rows)}\n{verdict}"
    report.say(json.dumps(found, indent=2) if arguments.json else text)
    return 0 if found["holds"] else 1
