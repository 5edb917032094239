"""``gate``: the runbook's rows and sign-offs, run and judged; a table and a receipt."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mens_core
from mens_core import report

if TYPE_CHECKING:
    from mens_core.acceptance.steps import StepResult

__all__ = ["add_arguments", "run"]

_DESCRIPTION = """\
Runs the acceptance runbook: each step is tests or commands in processes of their own, and a machine judges it. A step
that selects no test, skips one, or whose file is missing fails. The first failed step ends the gate, unless
--keep-going is given. The exit code is the verdict: 0 every step passed, 1 one did not.

profiles:
  m1m4      M1 plan and keys, M2 preflight and forward, M3 adapters and merges, M4 parity and corpus
  training  rows 1 to 12: the same, and a LoRA and a QLoRA run with the runbook's own commands
  ci_full   every row and sign-off, with runs of every kernel and family

Needs pytest and both backends: pip install 'mens-core[all,testing]'."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``gate``."""
    parser.description = _DESCRIPTION
    parser.add_argument("--profile", default="m1m4", metavar="NAME", help="which steps (default: %(default)s)")
    parser.add_argument("--keep-going", action="store_true", help="run the steps after a failed one, too")
    parser.add_argument("--json", action="store_true", help="print the receipt instead of lines and a table")
    parser.add_argument(
        "--receipt", type=Path, default=Path("gate_receipt.json"), metavar="FILE", help="receipt (default: %(default)s)"
    )
    parser.add_argument(
        "--profiles", type=Path, metavar="FILE", help="YAML file of steps of your own (default: the package's)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the steps; returns 0 if all passed and 1 if not.

    Raises:
        ContractError: as ``run_gate`` does.
    """
    found = mens_core.run_gate(
        arguments.profile,
        keep_going=arguments.keep_going,
        receipt=arguments.receipt,
        profiles=arguments.profiles,
        news=None if arguments.json else _tell,
    )
    report.say(json.dumps(found, indent=2, ensure_ascii=False) if arguments.json else _text(found, arguments.receipt))
    return 0 if found["passed"] else 1


def _tell(step: StepResult) -> None:
    report.say(f"{step.verdict:<8} {step.name}, {step.seconds:.1f} s" + (f": {step.reason}" if step.reason else ""))
    if step.output:
        report.complain(step.output)


def _text(found: Mapping[str, Any], receipt: Path) -> str:
    header = ("part", "rows", "step", "collected", "passed", "failed", "skipped", "seconds", "verdict")
    rows = [
        (
            step["part"],
            " ".join(step["rows"]),
            step["name"],
            *(str(step[name]) for name in ("collected", "passed", "failed", "skipped")),
            f"{step['seconds']:.1f}",
            step["verdict"],
        )
        for step in found["steps"]
    ]
    short = sum(step["verdict"] != "passed" for step in found["steps"])
    verdict = f"{short} did not pass" if short else "all passed"
    name, seconds = found["profile"], found["seconds"]
    return f"\n{report.table(header, rows)}\n{name}: {len(rows)} steps, {verdict}, {seconds:.0f} s; receipt: {receipt}"
