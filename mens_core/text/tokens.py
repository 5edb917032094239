"""Token rows: many rows in three flat arrays, in memory or mapped from disk, seen one by one.

input_ids    t₀ t₁ t₂ t₃ t₄ t₅ t₆ …
supervised   ·  ·  ×  ×  ·  ·  × …
spans        [0,4) [4,7) …        a row is a span; cutting a row moves its ends and copies nothing
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import attrs
import numpy as np
from numpy.typing import NDArray

__all__ = ["TokenRow", "TokenRows"]

# What is made of a row's numbers exists for so many rows at a time.
_ROWS_AT_A_TIME = 1 << 16


@attrs.frozen(eq=False)
class TokenRow:
    """One row as tokens.

    Attributes:
        input_ids: (tokens,) int32.
        supervised: (tokens,) bool, true where the token itself is to be predicted; of the first token it has no
            meaning, since nothing stands before it.
    """

    input_ids: NDArray[np.int32]
    supervised: NDArray[np.bool_]


@attrs.frozen(eq=False)
class TokenRows(Sequence[TokenRow]):
    """Rows of tokens.

    Attributes:
        input_ids: (all tokens,) int32.
        supervised: (all tokens,) bool.
        starts: (rows,) int64, where each row begins.
        ends: (rows,) int64, behind its last token.
        trained: (rows,) int64, supervised tokens of each row without its first token.
    """

    input_ids: NDArray[np.int32]
    supervised: NDArray[np.bool_]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    trained: NDArray[np.int64]

    @classmethod
    def of(cls, rows: Iterable[TokenRow]) -> TokenRows:
        """Lay single rows end to end."""
        listed = list(rows)
        return cls.laid_out(
            np.concatenate([np.empty(0, np.int32), *(row.input_ids for row in listed)]),
            np.concatenate([np.empty(0, np.bool_), *(row.supervised for row in listed)]),
            np.asarray([len(row.input_ids) for row in listed], np.int64),
        )

    @classmethod
    def laid_out(
        cls,
        input_ids: NDArray[np.int32],
        supervised: NDArray[np.bool_],
        lengths: NDArray[np.int64],
        trained: NDArray[np.int64] | None = None,
    ) -> TokenRows:
        """Rows, none of them empty, that already lie end to end; their supervised tokens are counted if need be."""
        ends = np.cumsum(lengths)
        starts = ends - lengths
        if trained is None:
            counts = np.add.reduceat(supervised, starts, dtype=np.int64) if len(starts) else np.zeros(0, np.int64)
            trained = counts - supervised[starts]
        return cls(input_ids, supervised, starts, ends, trained)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(rows,) int64, tokens of each row; made anew every time."""
        return self.ends - self.starts

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return int(self.ends.sum() - self.starts.sum())

    def __len__(self) -> int:
        return len(self.starts)

    @overload
    def __getitem__(self, place: int) -> TokenRow: ...

    @overload
    def __getitem__(self, place: slice) -> TokenRows: ...

    def __getitem__(self, place: int | slice) -> TokenRow | TokenRows:
        if isinstance(place, slice):
            return attrs.evolve(self, starts=self.starts[place], ends=self.ends[place], trained=self.trained[place])
        start, end = self.starts[place], self.ends[place]
        return TokenRow(self.input_ids[start:end], self.supervised[start:end])

    def take(self, places: NDArray[np.integer[Any]] | NDArray[np.bool_]) -> TokenRows:
        """The rows at these places, or where this is true; no token is copied."""
        return TokenRows(self.input_ids, self.supervised, self.starts[places], self.ends[places], self.trained[places])

    def parts(self) -> Iterator[tuple[slice, TokenRows]]:
        """All rows, in order, some at a time: (their places, the rows)."""
        for start in range(0, len(self), _ROWS_AT_A_TIME):
            place = slice(start, start + _ROWS_AT_A_TIME)
            yield place, self[place]

    def cut(self, starts: NDArray[np.int64], ends: NDArray[np.int64]) -> TokenRows:
        """The rows with these spans instead; their supervised tokens are counted anew."""
        trained = np.fromiter(
            (np.count_nonzero(self.supervised[start + 1 : end]) for start, end in zip(starts, ends, strict=True)),
            np.int64,
            len(starts),
        )
        return attrs.evolve(self, starts=starts, ends=ends, trained=trained)
