"""``adapter diff``: how far two adapters are apart."""

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

_DESCRIPTION = """\
Says which modules only one of two adapters updates, and for each that both do how far the updates s·B·A are apart: the
Frobenius norm of the difference as a share of the larger norm, so 0 for the same update and 2 for its opposite. What is
compared is the product: other factors, ranks or formats of the same product are no difference."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``adapter diff``."""
    parser.description = _DESCRIPTION
    for name in ("left", "right"):
        parser.add_argument(
            name, type=Path, metavar=name.upper(), help="run, folder of PEFT's or mlx-lm's, or made by adapter convert"
        )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print the comparison; returns 0.

    Raises:
        ModelError: if one cannot be read, or they are of bases of different shapes.
    """
    found = mens_core.compare_adapters(arguments.left, arguments.right)
    report.say(json.dumps(found, indent=2) if arguments.json else _text(found))
    return 0


def _text(found: Mapping[str, Any]) -> str:
    alone = {
        f"only in {side}": [*found[f"only_{end}"], *found[f"whole_only_{end}"]]
        for end, side in (("left", found["left"]), ("right", found["right"]))
    } | {"whole, and not the same": found["whole_differing"]}
    norms = f"norms {found['norm_left']:.4g} and {found['norm_right']:.4g}"
    lines = [
        f"all updates together: {found['relative_difference']:.3g} apart, {norms}",
        *(f"{printable(label)}: {printable(', '.join(names))}" for label, names in alone.items() if names),
    ]
    rows = [
        (printable(module), f"{one['relative']:.3g}", f"{one['left']:.4g}", f"{one['right']:.4g}")
        for module, one in found["modules"].items()
    ]
    return "\n".join([*lines, "", report.table(("module", "apart", "norm", "norm"), rows)])
