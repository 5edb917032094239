"""``corpus``: make the rows that training reads, and look at them.

A sub-verb is a module with ``add_arguments(parser)`` and ``run(arguments) -> int``, as a verb is.
"""

from __future__ import annotations

import argparse
from types import ModuleType

from mens_core.cli import corpus_mix, corpus_pairs, corpus_show, corpus_stats, corpus_validate
from mens_core.cli.sub_verbs import add_sub_verbs, run_sub_verb

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
    add_sub_verbs(parser, SUB_VERBS)


run = run_sub_verb
