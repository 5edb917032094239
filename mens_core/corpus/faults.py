"""What is wrong with rows: collected by kind over a whole file, told all at once.

A row that cannot be used is booked with its line. Whether the file is refused for it or the rows are left out is
decided when all of them have been seen.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import attrs

from mens_core.errors import DataError

__all__ = ["Fault", "FaultKind", "Faults", "kind_of", "nearest", "shortened", "text_of"]

_LINES_SHOWN, _KINDS_SHOWN, _CHARACTERS_SHOWN = 5, 20, 60


class Fault(Exception):  # noqa: N818 (a finding about one row, collected and never shown by itself)
    """What is wrong with one row.

    Args:
        kind: what was found, without anything of the row's own that would make every row a kind of its own.
        expected: what would have been accepted.
    """

    def __init__(self, kind: str, expected: str) -> None:
        super().__init__(kind)
        self.kind, self.expected = kind, expected


@attrs.frozen
class FaultKind:
    """One kind of fault in a file.

    Attributes:
        kind: what was found.
        expected: what would have been accepted, as said of the first of these rows.
        rows: how many rows have it.
        first_lines: line numbers of the first few of them, from 1.
    """

    kind: str
    expected: str
    rows: int
    first_lines: tuple[int, ...]


class Faults:
    """The faulty rows of one file.

    Args:
        path: of the file, for messages.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        #: Rows seen, faulty or not.
        self.lines = 0
        self._kinds: dict[str, tuple[str, int, list[int]]] = {}

    def add(self, fault: Fault, line: int) -> None:
        """Book one row."""
        expected, count, lines = self._kinds.get(fault.kind, (fault.expected, 0, []))
        if len(lines) <= _LINES_SHOWN:
            lines.append(line)
        self._kinds[fault.kind] = expected, count + 1, lines

    @property
    def count(self) -> int:
        """Rows that cannot be used."""
        return sum(count for _, count, _ in self._kinds.values())

    def by_kind(self) -> Mapping[str, int]:
        """Kind of fault → rows that have it, the most frequent first."""
        return {found.kind: found.rows for found in self.kinds()}

    def kinds(self) -> tuple[FaultKind, ...]:
        """Every kind that was found, the most frequent first."""
        found = [
            FaultKind(kind, expected, count, tuple(lines[:_LINES_SHOWN]))
            for kind, (expected, count, lines) in self._kinds.items()
        ]
        return tuple(sorted(found, key=lambda kind: (-kind.rows, kind.first_lines[0])))

    def check(self, most: float = 0.0) -> None:
        """Refuse the file if more than a share of its rows cannot be used.

        Args:
            most: the largest share that may be left out, from 0, by which no row may be faulty, to 1.

        Raises:
            DataError: listing every kind once: rows, first lines, what was expected.
        """
        if self.count > most * self.lines:
            allowed = f"; at most {most:.3g} of them may be left out" if most else ""
            raise DataError(
                self.text() + allowed,
                where=self.path,
                fix="correct these lines, or delete them; no row of the file has been used",
            )

    def as_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON; ``from_dict`` reads it."""
        return {"lines": self.lines, "kinds": [[kind, *entry] for kind, entry in self._kinds.items()]}

    @classmethod
    def from_dict(cls, path: Path, stored: Mapping[str, Any]) -> Self:
        """The faults of ``as_dict``."""
        faults = cls(path)
        faults.lines = stored["lines"]
        faults._kinds = {kind: (expected, count, lines) for kind, expected, count, lines in stored["kinds"]}
        return faults

    def text(self) -> str:
        """How many rows are faulty, and every kind: rows, first lines, what was expected."""
        kinds = self.kinds()
        listed = [f"{self.count} of {_number(self.lines, 'line')} cannot be used"]
        for found in kinds[:_KINDS_SHOWN]:
            first = ", ".join(map(str, found.first_lines)) + (", …" if found.rows > _LINES_SHOWN else "")
            listed.append(f"  {_number(found.rows, 'row')}: {found.kind} (line {first})")
            listed.append(f"    expected: {found.expected}")
        if rest := kinds[_KINDS_SHOWN:]:
            rows = sum(found.rows for found in rest)
            listed.append(f"  {_number(rows, 'row')} with {_number(len(rest), 'more kind')} of fault")
        return "\n".join(listed)


def kind_of(value: object) -> str:
    """What JSON calls a value."""
    names = {dict: "object", list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")


def shortened(value: object) -> str:
    """A value as it is shown in a message."""
    shown = repr(value)
    return shown if len(shown) <= _CHARACTERS_SHOWN else shown[: _CHARACTERS_SHOWN - 1] + "…"


def nearest(key: str, given: Iterable[str]) -> str:
    """A hint at a key that may have been meant; empty without one."""
    close = difflib.get_close_matches(key, given, n=1, cutoff=0.7)
    return f" (found {shortened(close[0])}: did you mean {key!r}?)" if close else ""


def text_of(value: Any, what: str, *, blank: bool = False) -> str:
    """A text, with something to see in it unless it may be blank.

    Raises:
        Fault: naming it by ``what``.
    """
    if not isinstance(value, str):
        raise Fault(f"{what} is a JSON {kind_of(value)}", f"{what} as a text")
    if not blank and (not value or value.isspace()):
        raise Fault(f"{what} is empty", f"{what} with at least one visible character")
    return value


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
