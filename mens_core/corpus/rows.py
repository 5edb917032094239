"""The row of a ``train.jsonl`` and the readers that check it.

One JSON object a line, in one of these forms, told apart by their keys; a null counts as absent:

    {"prompt": …, "response": …}                                         also spelt instruction, output
    {"instruction": …, "input": …, "output": …}                          Alpaca; the input follows after a blank line
    {"turns": [{"role": …, "content": …}, …]}                            also spelt messages; tool calls as OpenAI's
    {"conversations": [{"from": …, "value": …}, …]}                      ShareGPT

Beside them may stand ``system``, ``tools`` and ``source``; all other keys are kept as metadata. Faulty rows are booked,
not raised one by one: the error of a file lists every kind of fault once, with the number of rows that have it and
the first of their lines.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mens_core.corpus.faults import Fault, Faults, kind_of, nearest, text_of
from mens_core.corpus.json_line import read_object
from mens_core.corpus.lines import read_lines
from mens_core.corpus.messages import check_order, read_message, read_shared
from mens_core.corpus.row import Row, Turn
from mens_core.corpus.tool_calls import read_tools
from mens_core.errors import DataError

__all__ = ["FORMS", "iter_rows", "read_rows", "row_of", "sample_rows"]

#: What a row may look like, for messages.
FORMS = '{"prompt": "…", "response": "…"} or {"turns": [{"role": "user", "content": "…"}, …]}'

_TEXTS = ("prompt", "instruction", "input", "response", "output", "system")
_READ = frozenset({*_TEXTS, "turns", "messages", "conversations", "tools", "source"})


def iter_rows(path: Path, faults: Faults, read: Callable[[Mapping[str, Any], int], Row] | None = None) -> Iterator[Row]:
    """Yield the usable rows of a file as it is read, in its order.

    Args:
        path: one JSON object a line, UTF-8, plain or packed by gzip or Zstandard; a byte-order mark and Windows
            line ends are accepted. One line at a time is in memory.
        faults: the other rows are booked here; ``faults.lines`` counts every line. Nothing is refused for them
            until ``faults.check`` is asked.
        read: (parsed line, its number) → row, or ``Fault``; ``row_of`` if not given.

    Raises:
        DataError: if the file is missing, is no file, is empty, or is packed and damaged.
    """
    read = read or row_of
    for text in read_lines(path):
        faults.lines += 1
        try:
            row = read(read_object(text, FORMS), faults.lines)
        except Fault as fault:
            faults.add(fault, faults.lines)
        else:
            yield row
    if not faults.lines:
        raise DataError("the file of rows is empty", where=path, expected=f"one row a line: {FORMS}")


def read_rows(path: Path) -> list[Row]:
    """Read and check every row of a file that fits into memory.

    Args:
        path: as for ``iter_rows``.

    Returns:
        The rows in the order of the file; at least one.

    Raises:
        DataError: as for ``iter_rows``, or if a row is faulty. All faults are listed together: kind, number of
            rows, first lines, what was expected, nearest known key.
    """
    faults = Faults(path)
    rows = list(iter_rows(path, faults))
    faults.check()
    return rows


def sample_rows(path: Path, most: int) -> tuple[list[Row], int, int]:
    """Read rows at even distances all over a file, to learn of what size they are.

    Args:
        path: as for ``iter_rows``; it is read through once, and only the sample is parsed.
        most: rows wanted. A file of no more lines than that is read whole, of a longer one at least half as many.

    Returns:
        (rows; lines read that are faulty; lines in the file).

    Raises:
        DataError: as ``read_rows`` does, if no row of the sample can be used.
    """
    step, count, lines = 1, 0, []
    for text in read_lines(path):
        if count % step == 0:
            lines.append(text)
            if len(lines) > most:
                # As if the distance had been twice as long from the beginning.
                step, lines = 2 * step, lines[::2]
        count += 1
    rows = [row for place, text in enumerate(lines) if (row := _usable(text, 1 + place * step)) is not None]
    if not rows:
        faults = Faults(path)
        for _ in iter_rows(path, faults):
            pass
        faults.check()
    return rows, len(lines) - len(rows), count


def _usable(text: bytes, line: int) -> Row | None:
    try:
        return row_of(read_object(text, FORMS), line)
    except Fault:
        return None


def row_of(record: Mapping[str, Any], line: int) -> Row:
    """The row that a parsed line stands for.

    Args:
        record: from ``read_object``.
        line: its number, from 1.

    Raises:
        Fault: if it cannot be used.
    """
    turns = _turns(record)
    check_order(turns)
    source, tools = record.get("source", ""), record.get("tools")
    return Row(
        turns,
        source if type(source) is str else json.dumps(source),
        line,
        {key: record[key] for key in record if key not in _READ},
        read_tools(tools) if tools is not None else (),
    )


def _turns(record: Mapping[str, Any]) -> tuple[Turn, ...]:
    conversation, shared = _either(record, "turns", "messages"), record.get("conversations")
    prompt, response = _either(record, "prompt", "instruction"), _either(record, "response", "output")
    _check_form(conversation, shared, prompt if response is None else response)
    if conversation is not None:
        turns = _conversation(conversation, "turns", read_message)
    elif shared is not None:
        turns = _conversation(shared, "conversations", read_shared)
    else:
        asked = _text(prompt, "prompt", "instruction", record)
        if record.get("input") is not None:
            asked += _input(record)
        turns = (Turn("user", asked), Turn("assistant", _text(response, "response", "output", record)))
    if record.get("system") is None:
        return turns
    system = Turn("system", text_of(record["system"], "'system'"))
    if turns[0].role == "system" and turns[0] != system:
        raise Fault("a system key and a system turn that differ", "one of the two, or both alike")
    return turns if turns[0].role == "system" else (system, *turns)


def _either(record: Mapping[str, Any], first: str, second: str) -> Any:
    """The value under either spelling; None when both are missing or null."""
    one, other = record.get(first), record.get(second)
    if one is not None and other is not None and one != other:
        raise Fault(f"{first!r} and {second!r} that differ", "one of the two, or both alike")
    return other if one is None else one


def _check_form(conversation: Any, shared: Any, pair: Any) -> None:
    if (conversation is not None) + (shared is not None) + (pair is not None) > 1:
        names = {"turns": conversation, "conversations": shared, "prompt or response": pair}
        given = [name for name, value in names.items() if value is not None]
        raise Fault(f"both {' and '.join(given)}", "one of the forms: " + FORMS)


def _text(text: Any, first: str, second: str, record: Mapping[str, Any]) -> str:
    if type(text) is str and text and not text.isspace():
        return text
    if text is None:
        unknown = [key for key in record if key not in _READ]
        raise Fault(f"no {first!r}{nearest(first, unknown) or nearest(second, unknown)}", FORMS)
    return text_of(text, repr(first))


def _input(record: Mapping[str, Any]) -> str:
    more = record["input"]
    if isinstance(more, str) and not more.strip():
        return ""
    if record.get("instruction") is None:
        raise Fault("an 'input' beside a 'prompt'", "'instruction' and 'input', or all of it in 'prompt'")
    return "\n\n" + text_of(more, "'input'")


def _conversation(value: Any, key: str, read: Callable[[Any], Turn]) -> tuple[Turn, ...]:
    if type(value) is not list:
        raise Fault(f"{key!r} is a JSON {kind_of(value)}", FORMS)
    if not value:
        raise Fault(f"{key!r} is empty", "at least one turn, the last of them by the assistant")
    return tuple(map(read, value))
