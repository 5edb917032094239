"""``corpus``: make the rows that training reads, and look at them.

A sub-verb is a module with ``add_arguments(parser)`` and ``run(arguments) -> int``, as a verb is.
"""

from __future__ import annotations

import argparse
from types import ModuleType

from mens_core.cli import corpus_mix, corpus_pairs, corpus_show, corpus_stats, corpus_validate

__all__ = ["SUB_VERBS", "add_arguments", "run"]

#: Sub-verb → (what it is for, its module).
SUB_VERBS: dict[str, tuple[str, ModuleType]] = {
    "pairs": ("rows of prompt and response from Python, Markdown and validated code", corpus_pairs),
    "mix": ("rows of several sources in the shares that were asked for", corpus_mix),
    "stats": ("what is in files of rows", corpus_stats),
    "validate": ("everything that is wrong with files of rows", corpus_validate),
    "show": ("rows as a person reads them", corpus_show),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the sub-verbs of ``corpus`` and their flags."""
    verbs = parser.add_subparsers(title="sub-verbs", dest="corpus_verb", metavar="SUB-VERB", required=True)
    for name, (purpose, module) in SUB_VERBS.items():
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
        verb.set_defaults(run_corpus_verb=module.run)


def run(arguments: argparse.Namespace) -> int:
    """Run the chosen sub-verb; returns the exit status, 0 for success.

    Raises:
        DataError: as the sub-verb does.
    """
    status: int = arguments.run_corpus_verb(arguments)
    return status
