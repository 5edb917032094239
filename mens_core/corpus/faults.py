"""What is wrong with rows: collected by kind over a whole file, told all at once.

A row that cannot be used is booked with its line. Whether the file is refused for it or the rows are left out is
decided when all of them have been seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mens_core.errors import DataError

__all__ = ["Fault", "Faults"]

_LINES_SHOWN, _KINDS_SHOWN = 5, 20


class Fault(Exception):  # noqa: N818 (a finding about one row, collected and never shown by itself)
    """What is wrong with one row.

    Args:
        kind: what was found, without anything of the row's own that would make every row a kind of its own.
        expected: what would have been accepted.
    """

    def __init__(self, kind: str, expected: str) -> None:
        super().__init__(kind)
        self.kind, self.expected = kind, expected


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
        ranked = sorted(self._kinds.items(), key=lambda item: (-item[1][1], item[1][2][0]))
        return {kind: count for kind, (_, count, _) in ranked}

    def check(self, most: float = 0.0) -> None:
        """Refuse the file if more than a share of its rows cannot be used.

        Args:
            most: the largest share that may be left out, from 0, by which no row may be faulty, to 1.

        Raises:
            DataError: listing every kind once: rows, first lines, what was expected.
        """
        if self.count > most * self.lines:
            raise DataError(
                "\n".join([f"{self.count} of {_number(self.lines, 'line')} cannot be used", *self._listed()]),
                where=self.path,
                fix="correct these lines, or delete them; no row of the file has been used",
            )

    def _listed(self) -> list[str]:
        by_kind = self.by_kind()
        listed = []
        for kind in list(by_kind)[:_KINDS_SHOWN]:
            expected, count, lines = self._kinds[kind]
            first = ", ".join(map(str, lines[:_LINES_SHOWN])) + (", …" if count > _LINES_SHOWN else "")
            listed.append(f"  {_number(count, 'row')}: {kind} (line {first})\n    expected: {expected}")
        if len(by_kind) > _KINDS_SHOWN:
            rest = sum(list(by_kind.values())[_KINDS_SHOWN:])
            kinds = _number(len(by_kind) - _KINDS_SHOWN, "more kind")
            listed.append(f"  {_number(rest, 'row')} with {kinds} of fault")
        return listed


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
