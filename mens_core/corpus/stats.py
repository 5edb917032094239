"""What is in files of rows: how many of which kind, how long, how often the same."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

from mens_core.corpus.marks import content_mark
from mens_core.corpus.row import Row

__all__ = ["RowStats"]

_COUNTED = ("category", "lane", "rating", "difficulty", "response_mode")
_PLACE = re.compile(r":\d+$")


class RowStats:
    """Counts over rows; memory grows by some hundred bytes a row, for the duplicates.

    Attributes:
        rows: rows counted.
        duplicates: rows that say what an earlier one says, whatever their blanks.
        characters: of all contents together; ``supervised`` those of the assistant alone.
        counts: what is counted → value → rows; a row without the key counts under ``-``.
        turns: number of turns → rows.
        lengths: smallest power of two that is at least a row's characters → rows.
    """

    def __init__(self) -> None:
        self.rows = self.duplicates = self.characters = self.supervised = 0
        self.counts: Mapping[str, Counter[str]] = {name: Counter() for name in (*_COUNTED, "source", "roles")}
        self.turns, self.lengths = Counter[int](), Counter[int]()
        self._seen: set[bytes] = set()

    def add(self, row: Row) -> None:
        """Count a row."""
        self.rows += 1
        for name in _COUNTED:
            value = row.metadata.get(name)
            self.counts[name]["-" if value is None else str(value)] += 1
        self.counts["source"][_source_group(row.source)] += 1
        self.counts["roles"][" ".join(sorted({turn.role for turn in row.turns}))] += 1
        self.turns[len(row.turns)] += 1
        length = sum(len(turn.content) for turn in row.turns)
        self.characters += length
        self.supervised += sum(len(turn.content) for turn in row.turns if turn.role == "assistant")
        self.lengths[1 << max(length - 1, 0).bit_length()] += 1
        mark = content_mark(row)
        self.duplicates += mark in self._seen
        self._seen.add(mark)


def _source_group(source: str) -> str:
    """The first folder, or what stands before a colon: ``src/a.py:3`` → ``src``, ``tool_trace:s1`` → ``tool_trace``."""
    place = _PLACE.sub("", source)
    return re.split(r"[/:]", place, maxsplit=1)[0] or place or "-"
