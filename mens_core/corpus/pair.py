"""Rows to be, the piece of text they were made from, and the count of what became no row."""

from __future__ import annotations

import hashlib
from typing import Any

import attrs

__all__ = ["CODE_LANE", "DOCS_LANE", "Ledger", "Pair", "Piece", "Tally", "draw"]

#: Lanes of the data contract (the older system's names, so that its mixes select these rows too).
CODE_LANE, DOCS_LANE = "vox_codegen", "vox_docs_qa"

_EXAMPLES_KEPT = 5


@attrs.frozen(kw_only=True)
class Pair:
    """What is asked and what is to be learnt, once or several times over.

    Attributes:
        exchanges: (prompt, response), one for a plain row, more for a conversation.
        category: what kind of pair it is.
        task_family: what the task is, for mixes that choose by it.
        lane: ``CODE_LANE`` for nothing but code, otherwise ``DOCS_LANE``.
        response_mode: ``code_only`` or ``prose_only``; None where the responses are both.
        rating: how good an example it is, from 1 to 5.
        defect: what was broken in the prompt's code; None when nothing was.
    """

    exchanges: tuple[tuple[str, str], ...]
    category: str
    task_family: str
    lane: str = CODE_LANE
    response_mode: str | None = "code_only"
    rating: int = 5
    defect: str | None = None

    @property
    def responses(self) -> tuple[str, ...]:
        """What is to be learnt, in order."""
        return tuple(response for _, response in self.exchanges)

    @property
    def text(self) -> str:
        """Everything that is said, for lengths and hashes."""
        return "\0".join(said for exchange in self.exchanges for said in exchange)


@attrs.frozen(kw_only=True)
class Piece:
    """One function, one code block, one validated row: what several pairs are made from.

    Attributes:
        source: file and line it came from, ``folder/file.py:12``.
        text: by which near duplicates are known.
        origin: pieces and pairs with the same origin end up in the same part.
        constructs: of its syntax, by name, in alphabetical order; empty for prose.
        difficulty: from 1 to 10.
        pairs: at least one.
    """

    source: str
    text: str
    origin: str
    constructs: tuple[str, ...]
    difficulty: int
    pairs: tuple[Pair, ...]

    def record(self, pair: Pair) -> dict[str, Any]:
        """The row of one of the pairs, as it is written."""
        record: dict[str, Any]
        if len(pair.exchanges) == 1:
            record = dict(zip(("prompt", "response"), pair.exchanges[0], strict=True))
        else:
            said = [text for exchange in pair.exchanges for text in exchange]
            roles = ("user", "assistant") * len(pair.exchanges)
            record = {"turns": [{"role": role, "content": text} for role, text in zip(roles, said, strict=True)]}
        record |= {
            "category": pair.category,
            "difficulty": self.difficulty,
            "constructs": list(self.constructs),
            "rating": pair.rating,
            "source": self.source,
            "lane": pair.lane,
            "response_mode": pair.response_mode,
            "task_family": pair.task_family,
            "defect": pair.defect,
        }
        return {key: value for key, value in record.items() if value is not None}


def draw(seed: int, *texts: str) -> float:
    """A number from 0 to less than 1 that depends on the seed and the texts alone (BLAKE2b, RFC 7693)."""
    digest = hashlib.blake2b("\0".join([str(seed), *texts]).encode("utf-8", "surrogatepass"), digest_size=6)
    return int.from_bytes(digest.digest()) / 2**48


@attrs.frozen
class Tally:
    """How often something happened, and where first.

    Attributes:
        count: 0 or more.
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
