"""``generate``: one prompt, one answer."""

from __future__ import annotations

import argparse
import sys

import mens_core
from mens_core import report
from mens_core.cli.flags import add_contract_flags, given_fields

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``generate``."""
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the user's turn")
    parser.add_argument(
        "--adapter", metavar="DIR", help="run directory, or any folder in PEFT's format; without it the base answers"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=128, metavar="N", help="longest answer (tokens; default 128)"
    )
    add_contract_flags(parser, ("model", "compute"))


def run(arguments: argparse.Namespace) -> int:
    """Print the answer."""
    answer = mens_core.generate(
        arguments.prompt, adapter=arguments.adapter, max_new_tokens=arguments.max_new_tokens, **given_fields(arguments)
    )
    report.say(answer, as_it_is=not sys.stdout.isatty())
    return 0
