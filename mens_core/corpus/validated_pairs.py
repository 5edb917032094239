"""Validated rows → pieces: code that a tool has checked, one JSON object a line.

    {"code": …, "source": …, "constructs": [...]}      also: language, difficulty; other keys are not read

Code that parses as Python and holds functions is cut as a Python file is. Other code is asked for by each of its
constructs, category ``construct_to_code``.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

import attrs

from mens_core.corpus.constructs import PHRASES, Measure, difficulty_of_text, measure
from mens_core.corpus.pair import Ledger, Pair, Piece, draw
from mens_core.corpus.python_functions import DocumentedFunction, functions_of
from mens_core.corpus.python_pairs import Shares, pieces_of_functions
from mens_core.corpus.syntax import walk

__all__ = ["ValidatedRow", "validated_pieces"]

_NO_CONSTRUCT = "validated row without functions that can be cut, and without a construct to ask for"

_SENTENCES = (
    "Write {language}code with {construct}.",
    "Show how {construct} is written in {language}code.",
    "Give an example of {language}code that uses {construct}.",
    "Complete this {language}code; it uses {construct}.",
)
_PYTHON = {"py", "python", "python3"}
# Endings that are not the language's name.
_LANGUAGES = {"cpp": "C++", "cs": "C#", "hs": "Haskell", "js": "JavaScript", "kt": "Kotlin", "rb": "Ruby"}
_LANGUAGES |= {"py": "Python", "rs": "Rust", "sh": "shell", "sql": "SQL", "ts": "TypeScript"}
_ENDING = re.compile(r"\.([A-Za-z]\w*)(?::\d+)*$")


@attrs.frozen(kw_only=True)
class ValidatedRow:
    """One row of such a file.

    Attributes:
        code: not blank.
        source: as the row gives it, or the line of the file.
        constructs: that the row names, each once, in alphabetical order.
        language: in lower case, as the row names it or as the ending of its source; may be empty.
        difficulty: that the row names, from 1 to 10, or None.
    """

    code: str
    source: str
    constructs: tuple[str, ...]
    language: str
    difficulty: int | None


def validated_pieces(lines: Iterable[bytes], name: str, dropped: Ledger, shares: Shares) -> Iterator[Piece]:
    """The pieces of one file of validated rows, in its order.

    Args:
        lines: of the file, one row each.
        name: of the file, for the books.
        dropped: where rows that cannot be used are booked, with their line.
        shares: how many rows are made beyond the plain ones.
    """
    for number, line in enumerate(lines, start=1):
        place = f"{name}:{number}"
        try:
            row = _row(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line, place)
        except ValueError as error:
            dropped.add(f"validated row that cannot be used: {error}", place)
        else:
            yield from _pieces(row, place, dropped, shares)


def _pieces(row: ValidatedRow, place: str, dropped: Ledger, shares: Shares) -> Iterator[Piece]:
    functions, measured = _as_python(row)
    if functions:
        for piece in pieces_of_functions(functions, place, dropped, shares):
            yield attrs.evolve(piece, source=row.source)
        return
    constructs = tuple(sorted({*row.constructs, *(measured.constructs if measured else ())}))
    if not constructs:
        dropped.add(_NO_CONSTRUCT, place)
        return
    known = measured.difficulty if measured else difficulty_of_text(row.code)
    yield Piece(
        source=row.source,
        text=row.code,
        origin=row.code,
        constructs=constructs,
        difficulty=known if row.difficulty is None else row.difficulty,
        pairs=tuple(
            Pair(
                exchanges=((_ask(row, construct, shares.seed), row.code),),
                category="construct_to_code",
                task_family="codegen",
            )
            for construct in constructs
        ),
    )


def _as_python(row: ValidatedRow) -> tuple[list[DocumentedFunction], Measure | None]:
    """(functions, measure of the whole code); the latter is None if the code is not Python."""
    if row.language and row.language not in _PYTHON:
        return [], None
    try:
        return list(functions_of(row.code)), measure(walk(ast.parse(row.code)))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return [], None


def _ask(row: ValidatedRow, construct: str, seed: int) -> str:
    sentence = _SENTENCES[int(draw(seed, "sentence", construct, row.code) * len(_SENTENCES))]
    language = _LANGUAGES.get(row.language, row.language.capitalize())
    phrase = PHRASES.get(construct, f"the construct `{construct}`")
    asked = sentence.format(language=f"{language} " if language else "", construct=phrase)
    first, _, rest = row.code.strip().partition("\n")
    # With the construct alone, all rows that have it would ask the same and answer differently.
    return f"{asked} It begins with this line.\n\n{first}" if rest else asked


def _row(line: bytes, place: str) -> ValidatedRow:
    """Read one line; a ``ValueError`` says what is wrong with it."""
    record = _record(line)
    code, source, language = (_text(record, key) for key in ("code", "source", "language"))
    if not code.strip():
        raise ValueError("no 'code', or a blank one")
    difficulty = record.get("difficulty")
    if difficulty is not None and (type(difficulty) is not int or not 1 <= difficulty <= 10):
        raise ValueError("'difficulty' is not a whole number from 1 to 10")
    ending = _ENDING.search(source)
    return ValidatedRow(
        code=code.replace("\r\n", "\n").replace("\r", "\n").strip("\n"),
        source=source or place,
        constructs=_constructs(record),
        language=(language or (ending[1] if ending else "")).lower(),
        difficulty=difficulty,
    )


def _constructs(record: dict[str, Any]) -> tuple[str, ...]:
    value = record.get("constructs")
    names = [name for name in value if isinstance(name, str) and name] if isinstance(value, list) else []
    if value is not None and names != value:
        raise ValueError("'constructs' is not a list of names")
    return tuple(sorted(set(names)))


def _record(line: bytes) -> dict[str, Any]:
    if not line.strip():
        raise ValueError("a blank line")
    try:
        record = json.loads(line)
    except UnicodeDecodeError as error:
        raise ValueError("not UTF-8") from error
    except json.JSONDecodeError as error:
        raise ValueError("not JSON") from error
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")  # noqa: TRY004 (a row's fault, booked with the others)
    return record


def _text(record: dict[str, Any], key: str) -> str:
    value = record.get(key)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{key!r} is not a text")
    return value or ""
