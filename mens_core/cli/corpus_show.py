"""``corpus show``: rows as a person reads them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

from mens_core import report
from mens_core.corpus.faults import Faults
from mens_core.corpus.row import Row, Turn
from mens_core.corpus.rows import iter_rows
from mens_core.errors import DataError, printable

__all__ = ["add_arguments", "run"]

_ROWS_SHOWN = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``corpus show``."""
    parser.description = "Prints rows with their roles marked; the first few, unless others are asked for."
    parser.add_argument("file", type=Path, metavar="FILE", help="rows: .jsonl, plain, gzip or Zstandard")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--row", type=_count, metavar="N", help="only the row in this line, from 1")
    which.add_argument(
        "--first", type=_count, default=_ROWS_SHOWN, metavar="N", help="the first rows (default: %(default)s)"
    )
    parser.add_argument("--category", metavar="X", help="only rows of this category")


def run(arguments: argparse.Namespace) -> int:
    """Print; returns the exit status, 0 for success.

    Raises:
        DataError: if the file cannot be read, or has no such row.
    """
    faults = Faults(arguments.file)
    # Reading stops with the last row that is shown.
    rows = islice(_chosen(arguments, faults), 1 if arguments.row else arguments.first)
    first = next(rows, None)
    if first is None:
        raise DataError(
            "there is no such row" + ("\n" + faults.text() if faults.count else ""),
            where=f"{arguments.file}: {faults.lines:,} lines read",
            expected="a line that the file has, and a category that a row has",
        )
    for row in chain([first], rows):
        report.say(_text(row))
    return 0


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return count


def _chosen(arguments: argparse.Namespace, faults: Faults) -> Iterator[Row]:
    for row in iter_rows(arguments.file, faults):
        if arguments.row is not None and row.line > arguments.row:
            return
        in_category = arguments.category is None or row.metadata.get("category") == arguments.category
        if in_category and arguments.row in {None, row.line}:
            yield row


def _text(row: Row) -> str:
    said = {"source": row.source, **row.metadata} if row.source else dict(row.metadata)
    facts = [f"{key}: {value if isinstance(value, str) else json.dumps(value)}" for key, value in said.items()]
    tools = [f"tools: {', '.join(str(tool.get('function', tool)['name']) for tool in row.tools)}"] if row.tools else []
    head = f"── line {row.line} " + "─" * 60
    return "\n".join([head, *(printable(fact) for fact in facts + tools), *map(_turn_text, row.turns), ""])


def _turn_text(turn: Turn) -> str:
    name = f" {turn.name}" if turn.name else ""
    answers = f" (answers {turn.tool_call_id})" if turn.tool_call_id else ""
    lines = [f"[{turn.role}{name}{answers}]"]
    lines += [f"(thinks) {turn.reasoning}"] if turn.reasoning else []
    lines += [turn.content] if turn.content else []
    for call in turn.tool_calls:
        arguments = json.dumps(dict(call.arguments), ensure_ascii=False)
        lines.append(f"(calls{' ' + call.id if call.id else ''}) {call.name}{arguments}")
    return printable("\n".join(lines), keep="\n\t")
