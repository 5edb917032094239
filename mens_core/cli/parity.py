"""``parity``: torch, JAX and others against each other and against the specification; a table and a certificate."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import mens_core
from mens_core import report
from mens_core.hf.layout import GRAPHS

__all__ = ["add_arguments", "run"]

_EXAMPLES = """
examples:
  python -m mens_core parity --family all
      a tiny random model of every family: logits, losses, gradients, updates, NF4, merging, a short run
  python -m mens_core parity --model ./Qwen2.5-0.5B --backends torch,jax
      the same for a model of your own; where it is too large for the specification, the backends alone
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``parity``."""
    parser.epilog = _EXAMPLES
    subject = parser.add_mutually_exclusive_group(required=True)
    subject.add_argument("--model", metavar="DIR|ID", help="a base: a folder on disk or a hub id")
    subject.add_argument(
        "--family", choices=(*GRAPHS, "all"), help="a tiny random model of this family, or of each of them"
    )
    parser.add_argument(
        "--backends",
        type=lambda text: tuple(name.strip() for name in text.split(",") if name.strip()),
        metavar="NAMES",
        help="which backends take part, such as torch,jax (default: every one that is installed and can)",
    )
    parser.add_argument("--json", action="store_true", help="print the certificate instead of tables")
    parser.add_argument(
        "--output", type=Path, default=Path("parity.json"), metavar="FILE", help="certificate (default parity.json)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Compare, print, write the certificate; 1 if a comparison fails."""
    families = GRAPHS if arguments.family == "all" else [arguments.family] if arguments.family else []
    found = mens_core.certify(
        model=arguments.model,
        families=families,
        backends=arguments.backends,
        news=None if arguments.json else lambda part: report.say(report.parity_text(part) + "\n"),
    )
    text = json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False)
    arguments.output.write_text(text + "\n", encoding="utf-8")
    if arguments.json:
        report.say(text)
    else:
        failed = f"{found['failed']} do not hold" if found["failed"] else "all hold"
        report.say(f"{found['comparisons']} comparisons, {failed}; certificate: {arguments.output}")
    return 0 if found["passed"] else 1
