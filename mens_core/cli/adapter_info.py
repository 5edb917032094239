"""``adapter info``: what an adapter is."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mens_core
from mens_core import report
from mens_core.errors import printable

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``adapter info``."""
    parser.add_argument(
        "path", type=Path, metavar="PATH", help="run, folder of PEFT's or mlx-lm's, or safetensors file"
    )
    parser.add_argument("--meta", type=Path, metavar="FILE", help="description of an adapter of version 2 or 3")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print what is in it; returns 0.

    Raises:
        ModelError: if it cannot be read.
    """
    found = mens_core.describe_adapter(arguments.path, arguments.meta)
    report.say(json.dumps(found, indent=2) if arguments.json else _text(found))
    return 0


def _text(found: Mapping[str, Any]) -> str:
    nf4 = found["nf4"]
    stored = f", NF4 in blocks of {nf4['block_size']}" if nf4 else ""
    facts = [
        ("format", found["format"]),
        ("method", f"{found['method'] or 'its files do not say'}{stored}"),
        ("base", found["base_model"] or "its files do not say"),
        ("modules", ", ".join(f"{count} {name}" for name, count in found["targets"].items())),
        ("rank", ", ".join(map(str, found["ranks"]))),
        ("scale", ", ".join(f"{scale:g}" for scale in found["scales"])),
        ("parameters", f"{found['parameters']:,}"),
        ("norm", f"{found['norm']:.4g} of all updates s·B·A together"),
        *(("whole", f"{name} {tuple(shape)}") for name, shape in found["whole"].items()),
    ]
    rows = [
        (
            printable(module),
            str(one["rank"]),
            f"{one['scale']:g}",
            "×".join(map(str, one["shape"])),
            f"{one['norm']:.4g}",
        )
        for module, one in found["updates"].items()
    ]
    lines = [f"{label:<12}{printable(text)}" for label, text in facts]
    return "\n".join([*lines, "", report.table(("module", "rank", "scale", "out×in", "norm"), rows)])
