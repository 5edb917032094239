"""Sources → rows in a spool on disk: read, cut, checked, without duplicates.

file ─▶ pieces ─▶ each row: length, characters, equal to an earlier row? ─▶ each piece: near an earlier one? ─▶ spool
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Iterator
from typing import IO

from mens_core.corpus.markdown_pairs import markdown_pieces
from mens_core.corpus.near_duplicates import NearDuplicates
from mens_core.corpus.pair import Ledger, Pair, Piece
from mens_core.corpus.python_pairs import Shares, python_pieces
from mens_core.corpus.sources import PYTHON_ENDINGS, ROWS_ENDINGS, SourceFile, read_lines, read_source
from mens_core.corpus.split import Groups, fingerprint
from mens_core.corpus.validated_pairs import validated_pieces

__all__ = ["EQUAL", "NEAR", "Collector"]

#: Reasons by which a duplicate is booked.
EQUAL, NEAR = "equal to an earlier row", "of code or text nearly equal to an earlier one"


class Collector:
    """Takes pieces in, spools their good rows as lines and remembers what the split needs, some hashes a row.

    Args:
        spool: binary, empty, open for reading and writing; each row becomes a line of it.
        near: for the pieces' texts.
        shares: how many rows are made beyond the plain ones, and how long they may be.
        min_chars: of every response.
    """

    def __init__(self, spool: IO[bytes], near: NearDuplicates, shares: Shares, *, min_chars: int) -> None:
        self._spool, self._near, self._shares = spool, near, shares
        self._min_chars = min_chars
        self._seen: set[bytes] = set()
        self._kept_at: list[str] = []
        self.groups, self.dropped, self.duplicates, self.skipped = Groups(), Ledger(), Ledger(), Ledger()
        #: Of each row in the spool, in order.
        self.categories: list[str] = []
        self.difficulties = bytearray()
        self.files_read = 0

    def read(self, file: SourceFile) -> None:
        """Take in all pieces of a file; what cannot be used is booked."""
        if file.ends_with(ROWS_ENDINGS):
            self._take_all(validated_pieces(read_lines(file, self.skipped), file.name, self.dropped, self._shares))
            return
        text = read_source(file, self.skipped)
        if text is None:
            return
        try:
            self._take_all(self._pieces(file, text))
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            line = f":{error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
            reason = "not Python of this version" if line else f"not parsable ({type(error).__name__})"
            self.skipped.add(reason, f"{file.name}{line}")

    def _pieces(self, file: SourceFile, text: str) -> Iterator[Piece]:
        if file.ends_with(PYTHON_ENDINGS):
            return python_pieces(text, file.name, self.dropped, self._shares)
        return markdown_pieces(text, file.name, self.dropped)

    def _take_all(self, pieces: Iterable[Piece]) -> None:
        with warnings.catch_warnings():
            # What the parser thinks of other people's escape sequences is not for this report.
            warnings.simplefilter("ignore")
            for piece in pieces:
                self._take(piece)
        self.files_read += 1

    def _take(self, piece: Piece) -> None:
        pairs = [pair for pair in piece.pairs if self._is_usable(pair, piece.source)]
        pairs = [pair for pair in pairs if self._is_new(pair, piece.source)]
        if not pairs:
            return
        nearest = self._near.admit(piece.text)
        if nearest is not None:
            number, similarity = nearest
            example = f"{piece.source}, {similarity:.0%} like {self._kept_at[number]}"
            self.duplicates.add(NEAR, example, len(pairs))
            return
        self._kept_at.append(piece.source)
        for pair in pairs:
            self._keep(piece, pair)

    def _is_usable(self, pair: Pair, source: str) -> bool:
        reason = None
        if min(len(response.strip()) for response in pair.responses) < self._min_chars:
            reason = f"response shorter than {self._min_chars} characters"
        elif sum(len(prompt) + len(response) for prompt, response in pair.exchanges) > self._shares.max_chars:
            reason = f"row longer than {self._shares.max_chars} characters"
        elif not _is_unicode(pair.text):
            # A docstring may spell half a surrogate pair as an escape, which no file in UTF-8 can hold.
            reason = "text that UTF-8 cannot write"
        if reason is not None:
            self.dropped.add(reason, source)
        return reason is None

    def _is_new(self, pair: Pair, source: str) -> bool:
        if _content(pair) in self._seen:
            self.duplicates.add(EQUAL, source)
            return False
        return True

    def _keep(self, piece: Piece, pair: Pair) -> None:
        self._seen.add(_content(pair))
        texts = [piece.origin, pair.exchanges[0][0], *pair.responses]
        self.groups.add([fingerprint(text) for text in texts])
        self.categories.append(pair.category)
        self.difficulties.append(piece.difficulty)
        self._spool.write(json.dumps(piece.record(pair), ensure_ascii=False).encode() + b"\n")


def _content(pair: Pair) -> bytes:
    return hashlib.blake2b(pair.text.encode(), digest_size=16).digest()


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
