"""The command line: one module per verb, imported only when its verb is called.

A verb module has ``add_arguments(parser)`` and ``run(arguments) -> int``, the exit code. An error of this project
is printed as ``error: …`` and ends with exit code 2; ``--debug`` shows the trace. The list of verbs waits for argparse
alone, which takes most of the 40 ms until it is there.
"""

from __future__ import annotations

import argparse
import importlib
import sys

TYPE_CHECKING = False  # Every checker knows the name, and typing is not imported for it.
if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType
    from typing import NoReturn

__all__ = ["VERBS", "main"]

VERBS = {
    "plan": "say what a run would do, need and take, without spending anything",
    "train": "train a LoRA or QLoRA adapter",
    "merge-qlora": "make one model of a base and its QLoRA adapter",
    "merge-weights": "make one model of a base and its LoRA adapter",
    "merge-adapter": "make one model of a base and any adapter, or several",
    "eval": "measure the loss of a model, with or without its adapter, on rows",
    "generate": "answer a prompt with a base and, if given, its adapter",
    "chat": "talk with a base and, if given, its adapter",
    "adapter": "describe adapters, compare them, and write them in other formats",
    "status": "say how a run stands: how far, how fast, and whether it still lives",
    "watch": "follow a run from another terminal until it ends",
    "verify": "recheck every hash and claim that a run's manifest holds",
    "corpus": "make, mix and examine the rows to train on",
    "data": "show the rows as training sees them",
    "presets": "list the named settings",
    "backends": "list the compute backends, installed and missing",
    "parity": "certify the backends against each other and against the specification",
    "gate": "run the acceptance runbook: every row, judged, with a receipt",
    "mens-gate": "the same as gate, by its older name",
    "ci": "the same as gate, as the runbook calls it: ci mens-gate",
    "eval-gate": "judge a run by a policy: supervision, truncation, speed, held-out loss, exact answers",
    "doctor": "examine this machine and installation, and say which kernels can run",
    "init-model": "write a small, randomly initialised model folder",
}

# Verbs that share a module.
_MODULES = {"merge-qlora": "merge_adapter", "merge-weights": "merge_adapter", "mens-gate": "gate"}


class _Parser(argparse.ArgumentParser):
    """Words that are not understood end like every other error."""

    def error(self, message: str) -> NoReturn:
        _module("calling").complain_of(message, self.prog)
        sys.exit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after ``python -m mens_core``; those of the process if not given.

    Returns:
        The exit code: 0 done, 1 what was examined does not hold, 2 refused, 130 or 143 interrupted by SIGINT or
        SIGTERM, 124 out of the time that a run was given.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = _parse(words)
    arguments.words = words
    return int(_module("calling").call(arguments))


def _module(name: str) -> ModuleType:
    """Of this package, imported now."""
    return importlib.import_module(f"mens_core.cli.{name}")


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """Build the parser of the verb that is called; the others are listed, not imported."""
    parser = _Parser(
        prog="python -m mens_core",
        description="LoRA and QLoRA fine-tuning of Hugging Face causal language models on torch and JAX.",
        epilog="'python -m mens_core VERB --help' explains a verb.",
        allow_abbrev=False,
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    called = next((word for word in words if not word.startswith("-")), None)
    for verb, purpose in VERBS.items():
        verb_parser = verbs.add_parser(
            verb,
            help=purpose,
            description=f"{purpose[0].upper()}{purpose[1:]}.",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            # Of a verb that is not called nobody reads the help.
            add_help=verb == called,
        )
        if verb == called:
            module = _module(_MODULES.get(verb, verb.replace("-", "_")))
            module.add_arguments(verb_parser)
            verb_parser.add_argument("--debug", action="store_true", help="show the full trace of an error")
            verb_parser.set_defaults(run=module.run, parser=verb_parser)
    return parser


def _parse(words: Sequence[str]) -> argparse.Namespace:
    """Read the words; an unknown flag is an error that names the nearest one of its verb."""
    arguments, unknown = _parser(words).parse_known_args(words)
    if unknown:
        close = _module("calling").nearest_flag(unknown, _flags(arguments.parser))
        hint = f"; did you mean {close}?" if close else ""
        arguments.parser.error(f"there is no flag {unknown[0]}{hint}")
    return arguments


def _flags(parser: argparse.ArgumentParser) -> list[str]:
    flags = [flag for action in parser._actions for flag in action.option_strings]  # noqa: SLF001 (no public list)
    for action in parser._actions:  # noqa: SLF001
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
            flags += [flag for nested in action.choices.values() for flag in _flags(nested)]
    return flags
