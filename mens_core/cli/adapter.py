"""``adapter``: look at adapters, compare them, and write them in other formats.

A sub-verb is a module with ``add_arguments(parser)`` and ``run(arguments) -> int``, as a verb is.
"""

from __future__ import annotations

import argparse
from types import ModuleType

from mens_core.cli import adapter_convert, adapter_diff, adapter_info
from mens_core.cli.sub_verbs import add_sub_verbs, run_sub_verb

__all__ = ["SUB_VERBS", "add_arguments", "run"]

#: Sub-verb → (what it is for, its module).
SUB_VERBS: dict[str, tuple[str, ModuleType]] = {
    "info": ("what an adapter is: format, base, modules, ranks, scales, norms", adapter_info),
    "diff": ("how far two adapters are apart", adapter_diff),
    "convert": ("an adapter in another format", adapter_convert),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the sub-verbs of ``adapter`` and their flags."""
    add_sub_verbs(parser, SUB_VERBS)


run = run_sub_verb
