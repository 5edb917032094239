"""Texts that quote control tokens, tokenised so that the quotation stays text.

A second tokenizer knows every added token under a name that no text holds. In a conversation the control tokens
that are meant get these names; what is quoted keeps its letters, which are nothing special to it.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer

from mens_core.chat.open_chat import Rendered
from mens_core.corpus.faults import Fault

__all__ = ["Guard"]

# Two of Unicode's noncharacters, which no text interchanges (Unicode 16, section 23.7).
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"


class Guard:
    """The second tokenizer.

    Args:
        original: the first; it is not changed.
    """

    def __init__(self, original: Tokenizer) -> None:
        added = original.get_added_tokens_decoder()
        described = json.loads(original.to_str())
        # A post-processor names tokens that are about to go; none is wanted here.
        self.tokenizer = Tokenizer.from_str(json.dumps(described | {"added_tokens": [], "post_processor": None}))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        renamed = {entry.content: f"{_OPEN}{token}{_CLOSE}" for token, entry in added.items()}
        self.tokenizer.add_tokens([_named(entry, renamed[entry.content]) for entry in added.values()])
        self._renamed = renamed
        self._added = {entry.content: token for token, entry in added.items()}
        longest_first = sorted(renamed, key=len, reverse=True)
        self._any = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._ids = {self.tokenizer.token_to_id(renamed[entry.content]): token for token, entry in added.items()}

    def rename(self, rendered: Rendered) -> tuple[str, Sequence[tuple[int, int]]]:
        """The text with its own control tokens renamed and those it quotes left alone, and where its spans are then.

        Raises:
            Fault: if it holds the characters that set the names apart.
        """
        if _OPEN in rendered.text or _CLOSE in rendered.text:
            raise Fault("a noncharacter (U+FDD0 or U+FDD1) beside a quoted control token", "a text without it")
        ends = sorted(
            {0, len(rendered.text), *(end for span in (*rendered.supervised, *rendered.quoted) for end in span)}
        )
        quoted = set(rendered.quoted)
        moved, parts, length = {0: 0}, [], 0
        for start, end in itertools.pairwise(ends):
            inside = any(first <= start and end <= last for first, last in quoted)
            part = rendered.text[start:end]
            parts.append(part if inside else self._any.sub(lambda found: self._renamed[found[0]], part))
            length += len(parts[-1])
            moved[end] = length
        return "".join(parts), [(moved[start], moved[end]) for start, end in rendered.supervised]

    def restore(self, ids: NDArray[np.int32], quoted: Iterable[str]) -> NDArray[np.int32]:
        """The original tokenizer's ids.

        Args:
            ids: of the second tokenizer.
            quoted: the texts that are quoted.

        Raises:
            Fault: if the vocabulary itself reads a quotation as the control token.
        """
        tokens = ids.tolist()
        forged = {self._added.get(text) for text in quoted} - self._ids.keys()
        if not forged.isdisjoint(tokens):
            raise Fault("a quoted control token that this tokenizer cannot tell from the token", "a text without it")
        return np.fromiter((self._ids.get(token, token) for token in tokens), np.int32, len(tokens))


def _named(token: AddedToken, name: str) -> AddedToken:
    return AddedToken(
        name,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        special=token.special,
    )
