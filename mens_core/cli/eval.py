"""``eval``: the loss of a model on rows."""

from __future__ import annotations

import argparse
import json

import mens_core
from mens_core import report
from mens_core.cli.flags import add_contract_flags, given_fields

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``eval``."""
    parser.add_argument("--data", required=True, metavar="FILE", help="rows, such as eval.jsonl")
    parser.add_argument(
        "--adapter", metavar="DIR", help="run directory, or any folder in PEFT's format; without it the model alone"
    )
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    add_contract_flags(parser, ("model", "compute"))


def run(arguments: argparse.Namespace) -> int:
    """Print loss and perplexity."""
    found = mens_core.evaluate_model(arguments.data, adapter=arguments.adapter, **given_fields(arguments))
    report.say(json.dumps(found, indent=2) if arguments.json else report.evaluation_text(found))
    return 0
