"""``plan``: what a run would do and cost, decided without spending anything."""

from __future__ import annotations

import argparse
import json

import mens_core
from mens_core import report
from mens_core.cli.flags import add_contract_flags, add_layer_flags, contract_from

__all__ = ["add_arguments", "run"]

_EXAMPLES = """
examples:
  python -m mens_core plan --data-dir corpus --output-dir run
      which kernel, how much memory, how long; exit code 2 if the run would be refused
  python -m mens_core plan --model ./Qwen2.5-0.5B --data-dir corpus --output-dir run --compare
      every backend and both methods side by side
  python -m mens_core plan --config run.yaml --preset safe --explain
      where every value comes from
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``plan``."""
    parser.epilog = _EXAMPLES
    add_layer_flags(parser)
    parser.add_argument("--json", action="store_true", help="print the whole plan as JSON")
    parser.add_argument("--compare", action="store_true", help="ask every backend, with every method")
    parser.add_argument("--explain", action="store_true", help="say of every value where it comes from")
    add_contract_flags(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the plan; 2 if a run would be refused."""
    plan = mens_core.Planner().plan(contract_from(arguments), compare=arguments.compare)
    if arguments.json:
        report.say(json.dumps(plan.as_dict(), indent=2))
    else:
        report.say(report.plan_text(plan.as_dict()))
        if arguments.explain:
            report.say("\n" + report.origins_text(plan.as_dict()))
    refused = [verdict for verdict in plan.preflight if not verdict.passed]
    return 2 if refused else 0
