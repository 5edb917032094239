"""``adapter``: look at adapters, compare them, and write them in other formats.

A sub-verb is a module with ``add_arguments(parser)`` and ``run(arguments) -> int``, as a verb is.
"""

from __future__ import annotations

import argparse
from types import ModuleType

from mens_core.cli import adapter_convert, adapter_diff, adapter_info

__all__ = ["SUB_VERBS", "add_arguments", "run"]

#: Sub-verb → (what it is for, its module).
SUB_VERBS: dict[str, tuple[str, ModuleType]] = {
    "info": ("what an adapter is: format, base, modules, ranks, scales, norms", adapter_info),
    "diff": ("how far two adapters are apart", adapter_diff),
    "convert": ("an adapter in another format", adapter_convert),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the sub-verbs of ``adapter`` and their flags."""
    verbs = parser.add_subparsers(title="sub-verbs", dest="adapter_verb", metavar="SUB-VERB", required=True)
    for name, (purpose, module) in SUB_VERBS.items():
        verb = verbs.add_parser(
            name,
            help=purpose,
            description=f"{purpose[0].upper()}{purpose[1:]}.",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(verb)
        verb.add_argument("--json", action="store_true", help="print the result as JSON")
        # The verb has this flag too; here it may stand behind the sub-verb, where one writes it.
        verb.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show the full trace of an error"
        )
        verb.set_defaults(run_adapter_verb=module.run)


def run(arguments: argparse.Namespace) -> int:
    """Run the chosen sub-verb; returns the exit status, 0 for success.

    Raises:
        ModelError: as the sub-verb does.
    """
    status: int = arguments.run_adapter_verb(arguments)
    return status
