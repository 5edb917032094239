"""``adapter convert``: an adapter in another format."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import mens_core
from mens_core import report
from mens_core.artifacts.formats import FORMATS

__all__ = ["add_arguments", "run"]

_DESCRIPTION = """\
Writes an adapter in another format, with the same numbers. What the format cannot say, such as ranks of their own or
tensors trained whole, is refused by name; what it leaves unsaid is noted."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``adapter convert``."""
    parser.description = _DESCRIPTION
    parser.add_argument(
        "path", type=Path, metavar="PATH", help="run, folder of PEFT's or mlx-lm's, or safetensors file"
    )
    parser.add_argument("--meta", type=Path, metavar="FILE", help="description of an adapter of version 2 or 3")
    parser.add_argument(
        "--to",
        required=True,
        choices=tuple(FORMATS),
        help="; ".join(f"{name}: {meaning}" for name, meaning in FORMATS.items()),
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder to make")
    parser.add_argument(
        "--method", choices=("lora", "qlora"), help="how it was trained, for v2 and v3, where its files do not say"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Convert and say what was written; returns 0.

    Raises:
        ModelError: if the adapter cannot be read, or not be said in that format.
    """
    done = mens_core.convert_adapter(
        arguments.path, arguments.to, arguments.output, meta=arguments.meta, method=arguments.method
    )
    lines = [
        f"{done['modules']} updates from {done['from']} to {done['to']}: {', '.join(done['files'])}",
        *(f"note: {note}" for note in done["notes"]),
        f"written to {done['output']}",
    ]
    report.say(json.dumps(done, indent=2) if arguments.json else "\n".join(lines))
    return 0
