"""``corpus validate``: everything that is wrong with files of rows."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import attrs

from mens_core import report
from mens_core.corpus.records import RECORD_FORMATS
from mens_core.corpus.validate import find_faults
from mens_core.errors import DataError, printable

__all__ = ["add_arguments", "run"]

_DESCRIPTION = """\
Reads every line and lists what cannot be used: each kind of fault with its rows, the first of their lines, and what was
expected. Ends with exit code 2 if there is any, with 0 if there is none."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``corpus validate``."""
    parser.description = _DESCRIPTION
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="rows: .jsonl, plain, gzip or Zstandard")
    parser.add_argument(
        "--record-format",
        choices=tuple(RECORD_FORMATS),
        help="what the lines are, for sources of a mix; without it rows in any form that training reads",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")


def run(arguments: argparse.Namespace) -> int:
    """Check and print; returns the exit status: 0 if every row can be used, else 2."""
    found = [_examined(path, arguments.record_format) for path in arguments.files]
    if arguments.json:
        documents = [{name: value for name, value in file.items() if name != "text"} for file in found]
        report.say(json.dumps({"schema_version": "mens.corpus.validate.v1", "files": documents}, indent=2))
    else:
        report.say("\n".join(str(file["text"]) for file in found))
    return 0 if all(file["usable"] for file in found) else 2


def _examined(path: Path, record_format: str | None) -> dict[str, object]:
    try:
        faults = find_faults(path, record_format)
    except DataError as error:
        # A file that cannot be read at all must not hide what is wrong with the others.
        return {"path": str(path), "usable": False, "error": error.what, "text": str(error)}
    told = faults.text() if faults.count else f"{faults.lines:,} rows, all usable"
    return {
        "path": str(path),
        "usable": not faults.count,
        "lines": faults.lines,
        "faulty": faults.count,
        "kinds": [attrs.asdict(kind) for kind in faults.kinds()],
        "text": printable(f"{path}: {told}", keep="\n"),
    }
