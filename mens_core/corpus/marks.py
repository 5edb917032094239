"""What makes two rows say the same: marks of whole rows, of what is asked and of what is answered.

A mark is a fingerprint that blanks and line breaks do not change. Two parts of a corpus are apart if no question of
the one, which is everything said before an assistant's turn but the system prompt, and no answer of it stands in the
other.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable

import attrs

from mens_core.corpus.row import Row, Turn
from mens_core.corpus.split import Groups, fingerprint

__all__ = ["Apart", "Overlap", "answers", "content_mark", "overlap", "questions"]

# An answer this short that so many rows share is a label, such as yes or positive: it tells nothing of a row, and
# keeping its rows together would leave nothing to split.
_LABEL_CHARACTERS, _LABEL_ROWS = 20, 10


def content_mark(row: Row) -> bytes:
    """The mark of everything that is said in a row, and by whom."""
    return fingerprint(*(part for turn in row.turns for part in (turn.role, turn.reasoning, _said(turn))))


def questions(row: Row) -> list[bytes]:
    """Marks of what stands before each assistant's turn; none for a turn before which nothing was asked."""
    said: list[str] = []
    marks = []
    for turn in row.turns:
        if turn.role == "assistant" and said:
            marks.append(fingerprint(*said))
        if turn.role != "system":
            said.append(_said(turn))
    return marks


def answers(row: Row) -> list[tuple[bytes, bool]]:
    """Marks of what each assistant's turn says, and whether it is as short as a label."""
    said = [_said(turn) for turn in row.turns if turn.role == "assistant"]
    return [(fingerprint(text), len(text.strip()) < _LABEL_CHARACTERS) for text in said]


def _said(turn: Turn) -> str:
    if not turn.tool_calls:
        return turn.content
    calls = [[call.name, dict(call.arguments)] for call in turn.tool_calls]
    return turn.content + json.dumps(calls, ensure_ascii=False, sort_keys=True)


class Apart:
    """Rows as they come, to be split so that the parts are apart."""

    def __init__(self) -> None:
        self._marks: list[bytes] = []
        self._short: defaultdict[bytes, list[int]] = defaultdict(list)

    def add(self, row: Row, content: bytes) -> None:
        """Take in a row with its ``content_mark``."""
        marks = [content, *questions(row)]
        for mark, short in answers(row):
            if short:
                self._short[mark].append(len(self._marks))
            else:
                marks.append(mark)
        self._marks.append(b"".join(marks))

    def labels(self) -> set[bytes]:
        """Marks of the answers that are labels and keep no rows together."""
        return {mark for mark, rows in self._short.items() if len(set(rows)) >= _LABEL_ROWS}

    def held_out(self, fraction: float, seed: int) -> list[bool]:
        """For each row in the order of adding, whether it is held out; as ``Groups.held_out``."""
        groups, labels, size = Groups(), self.labels(), 16
        joined: defaultdict[int, list[bytes]] = defaultdict(list)
        for mark, rows in self._short.items():
            for row in rows if mark not in labels else ():
                joined[row].append(mark)
        for row, marks in enumerate(self._marks):
            groups.add([marks[at : at + size] for at in range(0, len(marks), size)] + joined[row])
        return groups.held_out(fraction, seed)


@attrs.frozen
class Overlap:
    """What two parts have in common.

    Attributes:
        rows_read: rows of both parts together.
        questions: rows to train on that ask what a held-out row asks.
        answers: rows to train on that answer what a held-out row answers, labels aside.
    """

    rows_read: int
    questions: int
    answers: int


def overlap(train: Iterable[Row], held_out: Iterable[Row], labels: set[bytes]) -> Overlap:
    """Look for what stands in both parts.

    Args:
        train: rows to train on; they are only passed through.
        held_out: rows held out; their marks are kept in memory.
        labels: marks of answers that many rows share.
    """
    asked, answered, count = set[bytes](), set[bytes](), 0
    for row in held_out:
        asked.update(questions(row))
        answered.update(mark for mark, _ in answers(row))
        count += 1
    answered -= labels
    shared = [0, 0]
    for row in train:
        shared[0] += not asked.isdisjoint(questions(row))
        shared[1] += not answered.isdisjoint(mark for mark, _ in answers(row))
        count += 1
    return Overlap(count, *shared)
