"""The row of a ``train.jsonl`` and the reader that checks a whole file before any of it is used.

One JSON object a line, in one of two forms; keys beyond these are kept as metadata:

    {"prompt": …, "response": …, "system": …?}             also spelt instruction, output
    {"turns": [{"role": …, "content": …}, …], "system": …?}        also spelt messages

A file with faults is refused as a whole. Its error lists every kind of fault once, with the number of rows
that have it and the first of their lines.
"""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import attrs

from mens_core.errors import DataError

__all__ = ["ROLES", "Row", "Turn", "read_rows", "sample_rows"]

#: Who may speak. A system turn stands first, and an assistant turn last.
ROLES = ("system", "user", "assistant")

# The first spelling of each is the one named in messages.
_PROMPT, _RESPONSE, _TURNS = ("prompt", "instruction"), ("response", "output"), ("turns", "messages")
_FIELDS = (*_PROMPT, *_RESPONSE, *_TURNS, "system")
_FORMS = '{"prompt": "…", "response": "…"} or {"turns": [{"role": "user", "content": "…"}, …]}'
_LINES_SHOWN, _KINDS_SHOWN, _CHARACTERS_SHOWN = 5, 20, 60


@attrs.frozen
class Turn:
    """One message of a conversation.

    Attributes:
        role: one of ``ROLES``.
        content: the text, not blank, exactly as it stands in the file.
    """

    role: str
    content: str


@attrs.frozen
class Row:
    """One conversation to learn from.

    Attributes:
        turns: one or more; a system turn can only be the first, the last is the assistant's.
        source: where the text came from, by the row's own ``source`` key; empty when it has none.
        line: line number in the file, from 1.
        metadata: all other keys of the row, such as category, lane or rating, as parsed.
    """

    turns: tuple[Turn, ...]
    source: str
    line: int
    metadata: Mapping[str, Any] = attrs.field(factory=dict)


class _Fault(Exception):  # noqa: N818 (a finding about one row, collected and never shown by itself)
    """What is wrong with a row: the kind, which is counted, and what was expected instead."""

    def __init__(self, kind: str, expected: str) -> None:
        super().__init__(kind)
        self.kind, self.expected = kind, expected


def read_rows(path: Path) -> list[Row]:
    """Read and check every row of a ``train.jsonl``.

    Args:
        path: UTF-8 file with one JSON object a line; a byte-order mark and Windows line ends are accepted.

    Returns:
        The rows in the order of the file; at least one.

    Raises:
        DataError: if the file is missing, is no file, is empty, or has a faulty line. All faults are listed
            together: kind, number of rows, first lines, what was expected, nearest known key.
    """
    if not path.is_file():
        raise DataError(
            "the file of rows is a folder" if path.is_dir() else "the file of rows does not exist",
            where=path,
            expected="a file with one JSON object a line",
            fix="write one with: python -m mens_core corpus pairs SOURCES --output DIR",
        )
    rows: list[Row] = []
    faults: dict[str, tuple[str, list[int]]] = {}
    with path.open("rb") as file:
        for line, text in enumerate(file, start=1):
            try:
                rows.append(_row(text.removeprefix(b"\xef\xbb\xbf") if line == 1 else text, line))
            except _Fault as fault:
                faults.setdefault(fault.kind, (fault.expected, []))[1].append(line)
    if faults:
        raise _all_faults(path, faults, num_lines=line)
    if not rows:
        raise DataError("the file of rows is empty", where=path, expected=f"one row a line: {_FORMS}")
    return rows


def sample_rows(path: Path, most: int) -> tuple[list[Row], int, int]:
    """Read rows at even distances all over a file, to learn of what size they are.

    Args:
        path: as for ``read_rows``.
        most: rows wanted. A file of no more lines than that is read whole.

    Returns:
        (rows; lines read that are faulty; lines in the file).

    Raises:
        DataError: as ``read_rows`` does, if no row of the sample can be used.
    """
    with path.open("rb") as file:
        count = sum(piece.count(b"\n") for piece in iter(lambda: file.read(1 << 20), b""))
        file.seek(0)
        step = max(1, -(-count // most))
        lines = list(islice(file, 0, None, step))
    rows = [row for place, line in enumerate(lines) if (row := _usable(line, 1 + place * step)) is not None]
    if not rows:
        read_rows(path)  # it says what is wrong with them
    return rows, len(lines) - len(rows), max(count, len(lines))


def _usable(text: bytes, line: int) -> Row | None:
    try:
        return _row(text.removeprefix(b"\xef\xbb\xbf") if line == 1 else text, line)
    except _Fault:
        return None


def _all_faults(path: Path, faults: Mapping[str, tuple[str, list[int]]], num_lines: int) -> DataError:
    most_first = sorted(faults.items(), key=lambda item: (-len(item[1][1]), item[1][1][0]))
    listed = []
    for kind, (expected, lines) in most_first[:_KINDS_SHOWN]:
        first = ", ".join(map(str, lines[:_LINES_SHOWN])) + (", …" if len(lines) > _LINES_SHOWN else "")
        listed.append(f"  {_number(len(lines), 'row')}: {kind} (line {first})\n    expected: {expected}")
    if len(most_first) > _KINDS_SHOWN:
        rest = sum(len(lines) for _, (_, lines) in most_first[_KINDS_SHOWN:])
        kinds = _number(len(most_first) - _KINDS_SHOWN, "more kind")
        listed.append(f"  {_number(rest, 'row')} with {kinds} of fault")
    bad = sum(len(lines) for _, lines in faults.values())
    return DataError(
        "\n".join([f"{bad} of {_number(num_lines, 'line')} cannot be used", *listed]),
        where=path,
        fix="correct these lines, or delete them; no row of the file has been used",
    )


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _row(text: bytes, line: int) -> Row:
    record = _record(text)
    turns = _turns(record)
    _check_order(turns)
    source = record.get("source", "")
    metadata = {key: value for key, value in record.items() if key not in _FIELDS and key != "source"}
    return Row(turns, source if isinstance(source, str) else json.dumps(source), line, metadata)


def _record(text: bytes) -> dict[str, Any]:
    if not text.strip():
        raise _Fault("a blank line", "one JSON object on every line")
    try:
        record = json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_constant)
    except UnicodeDecodeError as error:
        raise _Fault("not UTF-8", f"UTF-8 text; the first wrong byte is {text[error.start]:#04x}") from error
    except json.JSONDecodeError as error:
        raise _Fault(f"not JSON: {error.msg}", f"{_FORMS}; see column {error.colno}") from error
    except ValueError as error:
        raise _Fault(f"not JSON: {error}", _FORMS) from error
    except RecursionError as error:
        raise _Fault("JSON nested too deeply", _FORMS) from error
    if not isinstance(record, dict):
        raise _Fault(f"a JSON {_kind(record)} instead of an object", _FORMS)
    return record


def _constant(name: str) -> None:
    raise _Fault(f"not JSON: {name}", "a finite number, or null")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise _Fault(f"the key {_short(key)} given twice in one object", "each key once")
    return record


def _turns(record: Mapping[str, Any]) -> tuple[Turn, ...]:
    conversation = _either(record, _TURNS)
    prompt, response = _either(record, _PROMPT), _either(record, _RESPONSE)
    if conversation is not None and (prompt is not None or response is not None):
        raise _Fault("both turns and prompt or response", "one of the two forms: " + _FORMS)
    if conversation is not None:
        turns = _conversation(conversation)
    elif isinstance(record.get("input"), str) and record["input"].strip():
        raise _Fault("an 'input' beside the prompt", "the input as a part of the prompt, which is all that is read")
    else:
        turns = (_turn("user", prompt, record, _PROMPT), _turn("assistant", response, record, _RESPONSE))
    if record.get("system") is None:
        return turns
    system = _turn("system", record["system"], record, ("system",))
    if turns[0].role == "system" and turns[0] != system:
        raise _Fault("a system key and a system turn that differ", "one of the two, or both alike")
    return turns if turns[0].role == "system" else (system, *turns)


def _either(record: Mapping[str, Any], spellings: tuple[str, str]) -> Any:
    """The value under either spelling; None when both are missing or null."""
    given = [(key, record[key]) for key in spellings if record.get(key) is not None]
    if len(given) == 2 and given[0][1] != given[1][1]:
        raise _Fault(f"{spellings[0]!r} and {spellings[1]!r} that differ", "one of the two, or both alike")
    return given[0][1] if given else None


def _turn(role: str, text: Any, record: Mapping[str, Any], spellings: tuple[str, ...]) -> Turn:
    if text is None:
        unknown = [key for key in record if key not in _FIELDS]
        near = [key for name in spellings for key in difflib.get_close_matches(name, unknown, n=1, cutoff=0.7)]
        hint = f" (found {_short(near[0])}: did you mean {spellings[0]!r}?)" if near else ""
        raise _Fault(f"no {spellings[0]!r}{hint}", _FORMS)
    return Turn(role, _content(text, repr(spellings[0])))


def _content(text: Any, field: str) -> str:
    if not isinstance(text, str):
        raise _Fault(f"{field} is a JSON {_kind(text)}", f"{field} as a text")
    if not text.strip():
        raise _Fault(f"{field} is empty", f"{field} with at least one visible character")
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise _Fault(f"{field} holds half of a surrogate pair", "characters that UTF-8 can write")
    return text


def _conversation(value: Any) -> tuple[Turn, ...]:
    if not isinstance(value, list):
        raise _Fault(f"'turns' is a JSON {_kind(value)}", '[{"role": "user", "content": "…"}, …]')
    if not value:
        raise _Fault("'turns' is empty", "at least one turn, the last of them by the assistant")
    return tuple(map(_message, value))


def _message(message: Any) -> Turn:
    form = '{"role": "user", "content": "…"}'
    if not isinstance(message, dict):
        raise _Fault(f"a turn is a JSON {_kind(message)}", form)
    others = [key for key, value in message.items() if key not in {"role", "content"} and value is not None]
    for key in ("role", "content"):
        if message.get(key) is None:
            near = difflib.get_close_matches(key, others, n=1, cutoff=0.7)
            hint = f" (found {_short(near[0])}: did you mean {key!r}?)" if near else ""
            raise _Fault(f"a turn has no {key!r}{hint}", form)
    if others:
        raise _Fault(f"a turn has the key {_short(others[0])}, which would be lost", f"nothing beyond {form}")
    role = message["role"]
    if role not in ROLES:
        near = difflib.get_close_matches(str(role).lower(), ROLES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise _Fault(f"a turn has the role {_short(role)}", f"one of {', '.join(ROLES)}{hint}")
    return Turn(role, _content(message["content"], f"the content of the {role}'s turn"))


def _check_order(turns: Iterable[Turn]) -> None:
    roles = [turn.role for turn in turns]
    if "system" in roles[1:]:
        raise _Fault("a system turn after the first turn", "the system turn first, or none")
    if roles[-1] != "assistant":
        raise _Fault(f"the last turn is the {roles[-1]}'s", "an assistant turn last: it is what is learnt")


def _kind(value: Any) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= _CHARACTERS_SHOWN else shown[: _CHARACTERS_SHOWN - 1] + "…"
