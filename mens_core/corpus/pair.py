"""A prompt with its response, and the count of what became neither."""

from __future__ import annotations

from typing import Any

import attrs

__all__ = ["CODE_LANE", "DOCS_LANE", "Ledger", "Pair", "Tally"]

#: Lanes of the data contract (the older system's names, so that its mixes select these rows too).
CODE_LANE, DOCS_LANE = "vox_codegen", "vox_docs_qa"

_EXAMPLES_KEPT = 5


@attrs.frozen(kw_only=True)
class Pair:
    """One row to be, before it is checked, deduplicated and put into a part.

    Attributes:
        prompt: what is asked.
        response: what is to be learnt.
        category: what kind of pair it is.
        source: file and line it came from, ``folder/file.py:12``.
        lane: ``CODE_LANE`` or ``DOCS_LANE``.
        response_mode: ``code_only`` or ``prose_only``.
        task_family: what the task is, for mixes that choose by it.
        origin: the text underneath; pairs with the same origin end up in the same part.
    """

    prompt: str
    response: str
    category: str
    source: str
    lane: str
    response_mode: str
    task_family: str
    origin: str

    def record(self) -> dict[str, Any]:
        """The row as it is written: everything but the origin."""
        return {field: getattr(self, field) for field in attrs.fields_dict(Pair) if field != "origin"}


@attrs.frozen
class Tally:
    """How often something happened, and where first.

    Attributes:
        count: 1 or more.
        examples: the first few places, in the order they were met.
    """

    count: int
    examples: tuple[str, ...]


class Ledger:
    """Counts by reason, with examples."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[int, list[str]]] = {}

    def add(self, reason: str, example: str, count: int = 1) -> None:
        """Book ``count`` cases of ``reason``, met at ``example``."""
        so_far, examples = self._entries.get(reason, (0, []))
        if len(examples) < _EXAMPLES_KEPT:
            examples.append(example)
        self._entries[reason] = so_far + count, examples

    def tallies(self) -> dict[str, Tally]:
        """The books by reason, in alphabetical order."""
        return {reason: Tally(count, tuple(shown)) for reason, (count, shown) in sorted(self._entries.items())}
