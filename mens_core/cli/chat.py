"""``chat``: a conversation on the terminal."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

import mens_core
from mens_core import report
from mens_core.cli.flags import add_contract_flags, given_fields
from mens_core.errors import DataError

__all__ = ["add_arguments", "run"]

_DESCRIPTION = """\
Reads one turn a line from the terminal or a pipe and answers each with all turns before it in mind, written by the
model's own chat template. The end of the input ends the conversation. An answer appears while it is made, until the
model ends its turn, or up to --max-new-tokens."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``chat``."""
    parser.description = _DESCRIPTION
    parser.add_argument(
        "--adapter", metavar="DIR", help="run directory, or any other adapter's folder; without it the base answers"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=512, metavar="N", help="longest answer (tokens; default 512)"
    )
    add_contract_flags(parser, ("model", "compute"))


def run(arguments: argparse.Namespace) -> int:
    """Answer until the input ends; returns 0.

    Raises:
        DataError: if the input is not text.
        ModelError: if base or adapter cannot be used, or the conversation has become too long for the model.
    """
    conversation = mens_core.Conversation(
        adapter=arguments.adapter, max_new_tokens=arguments.max_new_tokens, **given_fields(arguments)
    )
    try:
        for line in _lines():
            if line.strip():
                conversation.answer(line.rstrip("\r\n"), report.speak)
                report.say("")
    except UnicodeDecodeError as error:
        raise DataError(f"the input is not text: {error.reason}", where="standard input", expected="UTF-8") from error
    return 0


def _lines() -> Iterator[str]:
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    while True:
        try:
            yield input("> ")
        except EOFError:
            return
