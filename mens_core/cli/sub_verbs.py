"""A verb that has verbs of its own, each a module with ``add_arguments(parser)`` and ``run(arguments) -> int``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from types import ModuleType

__all__ = ["add_sub_verbs", "run_sub_verb"]


def add_sub_verbs(parser: argparse.ArgumentParser, sub_verbs: Mapping[str, tuple[str, ModuleType]]) -> None:
    """Add sub-verbs and their flags.

    Args:
        parser: of the verb.
        sub_verbs: name → (what it is for, its module).
    """
    verbs = parser.add_subparsers(title="sub-verbs", dest="sub_verb", metavar="SUB-VERB", required=True)
    for name, (purpose, module) in sub_verbs.items():
        verb = verbs.add_parser(
            name,
            help=purpose,
            description=f"{purpose[0].upper()}{purpose[1:]}.",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(verb)
        # The verb has this flag too; here it may stand behind the sub-verb, where one writes it.
        verb.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show the full trace of an error"
        )
        verb.set_defaults(run_sub_verb=module.run)


def run_sub_verb(arguments: argparse.Namespace) -> int:
    """Run the chosen sub-verb; returns its exit code.

    Raises:
        MensError: as the sub-verb does.
    """
    status: int = arguments.run_sub_verb(arguments)
    return status
