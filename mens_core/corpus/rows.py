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

from mens_core.corpus.faults import Fault, Faults
from mens_core.corpus.row import ROLES, Row, Turn
from mens_core.errors import DataError

__all__ = ["read_rows", "sample_rows"]

# The first spelling of each is the one named in messages.
_PROMPT, _RESPONSE, _TURNS = ("prompt", "instruction"), ("response", "output"), ("turns", "messages")
_FIELDS = (*_PROMPT, *_RESPONSE, *_TURNS, "system")
_FORMS = '{"prompt": "…", "response": "…"} or {"turns": [{"role": "user", "content": "…"}, …]}'
_CHARACTERS_SHOWN = 60


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
    faults = Faults(path)
    with path.open("rb") as file:
        for line, text in enumerate(file, start=1):
            faults.lines = line
            try:
                rows.append(_row(text.removeprefix(b"\xef\xbb\xbf") if line == 1 else text, line))
            except Fault as fault:
                faults.add(fault, line)
    faults.check()
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
    except Fault:
        return None


def _row(text: bytes, line: int) -> Row:
    record = _record(text)
    turns = _turns(record)
    _check_order(turns)
    source = record.get("source", "")
    metadata = {key: value for key, value in record.items() if key not in _FIELDS and key != "source"}
    return Row(turns, source if isinstance(source, str) else json.dumps(source), line, metadata)


def _record(text: bytes) -> dict[str, Any]:
    if not text.strip():
        raise Fault("a blank line", "one JSON object on every line")
    try:
        record = json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_constant)
    except UnicodeDecodeError as error:
        raise Fault("not UTF-8", f"UTF-8 text; the first wrong byte is {text[error.start]:#04x}") from error
    except json.JSONDecodeError as error:
        raise Fault(f"not JSON: {error.msg}", f"{_FORMS}; see column {error.colno}") from error
    except ValueError as error:
        raise Fault(f"not JSON: {error}", _FORMS) from error
    except RecursionError as error:
        raise Fault("JSON nested too deeply", _FORMS) from error
    if not isinstance(record, dict):
        raise Fault(f"a JSON {_kind(record)} instead of an object", _FORMS)
    return record


def _constant(name: str) -> None:
    raise Fault(f"not JSON: {name}", "a finite number, or null")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise Fault(f"the key {_short(key)} given twice in one object", "each key once")
    return record


def _turns(record: Mapping[str, Any]) -> tuple[Turn, ...]:
    conversation = _either(record, _TURNS)
    prompt, response = _either(record, _PROMPT), _either(record, _RESPONSE)
    if conversation is not None and (prompt is not None or response is not None):
        raise Fault("both turns and prompt or response", "one of the two forms: " + _FORMS)
    if conversation is not None:
        turns = _conversation(conversation)
    elif isinstance(record.get("input"), str) and record["input"].strip():
        raise Fault("an 'input' beside the prompt", "the input as a part of the prompt, which is all that is read")
    else:
        turns = (_turn("user", prompt, record, _PROMPT), _turn("assistant", response, record, _RESPONSE))
    if record.get("system") is None:
        return turns
    system = _turn("system", record["system"], record, ("system",))
    if turns[0].role == "system" and turns[0] != system:
        raise Fault("a system key and a system turn that differ", "one of the two, or both alike")
    return turns if turns[0].role == "system" else (system, *turns)


def _either(record: Mapping[str, Any], spellings: tuple[str, str]) -> Any:
    """The value under either spelling; None when both are missing or null."""
    given = [(key, record[key]) for key in spellings if record.get(key) is not None]
    if len(given) == 2 and given[0][1] != given[1][1]:
        raise Fault(f"{spellings[0]!r} and {spellings[1]!r} that differ", "one of the two, or both alike")
    return given[0][1] if given else None


def _turn(role: str, text: Any, record: Mapping[str, Any], spellings: tuple[str, ...]) -> Turn:
    if text is None:
        unknown = [key for key in record if key not in _FIELDS]
        near = [key for name in spellings for key in difflib.get_close_matches(name, unknown, n=1, cutoff=0.7)]
        hint = f" (found {_short(near[0])}: did you mean {spellings[0]!r}?)" if near else ""
        raise Fault(f"no {spellings[0]!r}{hint}", _FORMS)
    return Turn(role, _content(text, repr(spellings[0])))


def _content(text: Any, field: str) -> str:
    if not isinstance(text, str):
        raise Fault(f"{field} is a JSON {_kind(text)}", f"{field} as a text")
    if not text.strip():
        raise Fault(f"{field} is empty", f"{field} with at least one visible character")
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise Fault(f"{field} holds half of a surrogate pair", "characters that UTF-8 can write")
    return text


def _conversation(value: Any) -> tuple[Turn, ...]:
    if not isinstance(value, list):
        raise Fault(f"'turns' is a JSON {_kind(value)}", '[{"role": "user", "content": "…"}, …]')
    if not value:
        raise Fault("'turns' is empty", "at least one turn, the last of them by the assistant")
    return tuple(map(_message, value))


def _message(message: Any) -> Turn:
    form = '{"role": "user", "content": "…"}'
    if not isinstance(message, dict):
        raise Fault(f"a turn is a JSON {_kind(message)}", form)
    others = [key for key, value in message.items() if key not in {"role", "content"} and value is not None]
    for key in ("role", "content"):
        if message.get(key) is None:
            near = difflib.get_close_matches(key, others, n=1, cutoff=0.7)
            hint = f" (found {_short(near[0])}: did you mean {key!r}?)" if near else ""
            raise Fault(f"a turn has no {key!r}{hint}", form)
    if others:
        raise Fault(f"a turn has the key {_short(others[0])}, which would be lost", f"nothing beyond {form}")
    role = message["role"]
    if role not in ROLES:
        near = difflib.get_close_matches(str(role).lower(), ROLES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise Fault(f"a turn has the role {_short(role)}", f"one of {', '.join(ROLES)}{hint}")
    return Turn(role, _content(message["content"], f"the content of the {role}'s turn"))


def _check_order(turns: Iterable[Turn]) -> None:
    roles = [turn.role for turn in turns]
    if "system" in roles[1:]:
        raise Fault("a system turn after the first turn", "the system turn first, or none")
    if roles[-1] != "assistant":
        raise Fault(f"the last turn is the {roles[-1]}'s", "an assistant turn last: it is what is learnt")


def _kind(value: Any) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= _CHARACTERS_SHOWN else shown[: _CHARACTERS_SHOWN - 1] + "…"
