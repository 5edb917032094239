"""``eval-gate``: whether a run is good enough, by a policy."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import mens_core
from mens_core import report
from mens_core.errors import printable

__all__ = ["add_arguments", "run"]

_DESCRIPTION = """\
Judges a finished run by the gates of a policy, a YAML file:

  supervised_ratio: {min: 0.1, block: true}           share of the tokens trained on that count
  truncation: {max: 0.5, block: true}                 share of the rows whose length cost them something
  throughput: {min: 10, block: false}                 tokens a second, in the median step
  held_out_loss: {min_improvement: 0.1, block: true}  nats a token below the base
  exact_match:                                        share of prompts that are answered to the letter;
    codes: {file: codes.jsonl, min: 0.95, max_new_tokens: 16, block: true}   lines of prompt and expected
  per_context:                                        loss on the held-out rows of a category or lane
    tool_trace: {max_loss: 1.5, block: false}

A gate with block: true that does not hold ends with exit code 1, with block: false it warns. A number that the run
does not have does not hold. The verdicts are written to eval_gate_receipt.json in the run."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``eval-gate``."""
    parser.description = _DESCRIPTION
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--policy",
        type=Path,
        metavar="FILE",
        help="the gates (default: the package's: supervision, length, speed, loss)",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="receipt (default: eval_gate_receipt.json in the run)"
    )
    parser.add_argument("--json", action="store_true", help="print the receipt")


def run(arguments: argparse.Namespace) -> int:
    """Print every gate; returns 0 if no blocking gate fails and 1 if one does.

    Raises:
        MensError: as ``judge_run`` does.
    """
    found = mens_core.judge_run(arguments.run_dir, policy=arguments.policy, output=arguments.output)
    rows = [
        (
            gate["verdict"],
            printable(gate["gate"]),
            "missing" if gate["found"] is None else f"{gate['found']:.4g}",
            f"{gate['kind']} {gate['bound']:g}",
            "blocks" if gate["block"] else "warns",
            printable(gate["detail"]),
        )
        for gate in found["gates"]
    ]
    failed, warned = (sum(row[0] == verdict for row in rows) for verdict in ("failed", "warned"))
    text = report.table(("verdict", "gate", "found", "bound", "if not", "detail"), rows)
    text += f"\n{len(rows)} gates, {failed} failed, {warned} warned"
    report.say(json.dumps(found, indent=2, ensure_ascii=False) if arguments.json else text)
    return 0 if found["passed"] else 1
