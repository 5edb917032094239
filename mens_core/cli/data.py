"""``data``: look at the rows as training sees them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import mens_core
from mens_core import drawing, report
from mens_core.artifacts.files import write_text
from mens_core.cli.flags import add_contract_flags, add_layer_flags, given_fields
from mens_core.config import build_contract

__all__ = ["add_arguments", "run"]

_DESCRIPTION = """\
Prints rows with the tokens that are trained on in colour, the share of every role, the length of the rows, what is
lost and why, and every warning: all of it from the code that training reads its rows with.

  python -m mens_core data show --data-dir corpus
  python -m mens_core data show --data-dir corpus --model ./Qwen3-0.6B --row 17 --html rows.html"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the sub-verb of ``data`` and its flags."""
    verbs = parser.add_subparsers(title="sub-verbs", dest="data_verb", metavar="SUB-VERB", required=True)
    show = verbs.add_parser(
        "show",
        help="rows with the tokens that are trained on",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    show.add_argument("--first", type=int, default=3, metavar="N", help="show the first N rows (default 3)")
    show.add_argument(
        "--row", type=int, action="append", metavar="LINE", help="show the row on this line of the file; repeatable"
    )
    show.add_argument("--html", type=Path, metavar="FILE", help="write a page instead of printing the rows")
    show.add_argument("--no-colour", action="store_true", help="mark trained tokens with ⟦ ⟧, as in a pipe")
    add_layer_flags(show)
    add_contract_flags(show, ("model", "data"))
    show.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show the full trace of an error")


def run(arguments: argparse.Namespace) -> int:
    """Show the rows; returns 2 if a run over them would be refused."""
    contract = build_contract(
        ("flag", given_fields(arguments)), config=arguments.config, preset=arguments.preset, trains=False
    )
    preview = mens_core.preview_rows(
        contract,
        first=arguments.first,
        lines=arguments.row or (),
        news=lambda count: report.complain(f"{count:,} rows read"),
    )
    if arguments.html is None:
        text = drawing.preview_text(preview, colours=sys.stdout.isatty() and not arguments.no_colour)
        # The drawing escapes the rows; the colours are its own.
        report.say(text, as_it_is=True)
    else:
        write_text(arguments.html, drawing.preview_page(preview))
        report.say(f"written: {arguments.html}")
    return 2 if preview.refusal else 0
