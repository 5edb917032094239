"""Texts that come again and again, such as a system text or the tools of a corpus, are tokenised once.

A text is cut behind its ends of turns. They are control tokens, at which every tokenizer cuts as well, so the pieces'
ids are the text's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from tokenizers import Tokenizer

__all__ = ["Repeated"]

_MOST_KEPT = 4096

#: A piece of text, its ids where they are known, whether it is trained on.
Piece = tuple[str, list[int] | None, bool]


class Repeated:
    """The ids of pieces that were met before.

    Args:
        tokenizer: one that can be cut.
        tags: texts that end turns; those that are no token of their own are not cut at.
    """

    def __init__(self, tokenizer: Tokenizer, tags: Sequence[str]) -> None:
        added = {entry.content: token for token, entry in tokenizer.get_added_tokens_decoder().items()}
        self._tags = {tag: [added[tag]] for tag in tags if tag in added}
        self._at_tags = re.compile("|".join(f"({re.escape(tag)})" for tag in self._tags)) if self._tags else None
        self._kept: dict[str, list[int]] = {}
        self._met_once: set[int] = set()

    def pieces(self, text: str, supervised: Sequence[tuple[int, int]]) -> list[Piece]:
        """The text cut at the ends of its supervised spans and at its tags."""
        made: list[Piece] = []
        at = 0
        for start, end in supervised:
            if start > at:
                self._cut(made, text[at:start], trained=False)
            self._cut(made, text[start:end], trained=True)
            at = end
        if at < len(text):
            self._cut(made, text[at:], trained=False)
        return made

    def learn(self, text: str, ids: list[int]) -> None:
        """Keep the ids of a piece that is met a second time."""
        mark = hash(text)
        if mark not in self._met_once:
            if len(self._met_once) >= _MOST_KEPT * 16:
                self._met_once.clear()
            self._met_once.add(mark)
        elif len(self._kept) < _MOST_KEPT:
            self._kept[text] = ids

    def _cut(self, made: list[Piece], text: str, *, trained: bool) -> None:
        if self._at_tags is None:
            made.append((text, self._kept.get(text), trained))
            return
        parts = filter(None, self._at_tags.split(text))
        made += [(part, self._tags.get(part) or self._kept.get(part), trained) for part in parts]
