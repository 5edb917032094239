"""A file's rows as tokens, with what is needed to choose among them: built once, kept in memory or on disk.

rows ─▶ rendered ─▶ tokenised, a thousand at a time, beside the reading of the next ─▶ columns

Columns are written as they come, so that making them takes no more memory for many rows than for few.
"""

from __future__ import annotations

import gc
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import IO, Any

import attrs
import numpy as np
from numpy.typing import NDArray

from mens_core.chat.open_chat import Chat, Rendered
from mens_core.corpus.faults import Fault, Faults
from mens_core.corpus.row import Row
from mens_core.text.encode import Encoder
from mens_core.text.tokens import TokenRows

__all__ = [
    "COLUMNS",
    "NO_RATING",
    "UNUSABLE_RATING",
    "Columns",
    "RowTable",
    "Supervision",
    "table_in_memory",
    "table_of",
    "write_columns",
]

#: Stand in the column of ratings for a row without one, and for one whose rating is no number from 1 to 5.
NO_RATING, UNUSABLE_RATING = 0.0, -1.0

#: What a table consists of. ``tokens`` and ``mask`` have a number for each token, ``offsets`` one for where each row
#: begins and one for where the last ends, the others one for each row.
COLUMNS: Mapping[str, np.dtype[Any]] = {
    "tokens": np.dtype(np.int32),
    "mask": np.dtype(np.bool_),
    "offsets": np.dtype(np.int64),
    "trained": np.dtype(np.int64),
    "lines": np.dtype(np.int64),
    "source": np.dtype(np.int32),
    "ratings": np.dtype(np.float32),
    "context": np.dtype(np.int32),
}

_ROWS_AT_A_TIME, _CHARACTERS_AT_A_TIME = 1024, 1 << 20
_PLACE = re.compile("[/:]")
_UNNAMED = "(no source)"
_SEARCHED = ("category", "lane", "task_family")
_SAYS_NOTHING = "\n" * len(_SEARCHED)


@attrs.frozen
class Supervision:
    """Which of the assistant's tokens are trained on.

    Attributes:
        last_only: the last turn's alone.
        suffix: at most so many of a row's, counted from its end; None for all.
    """

    last_only: bool = False
    suffix: int | None = None

    @classmethod
    def parse(cls, text: str) -> Supervision:
        """Read ``all-assistant``, ``last-assistant`` or ``suffix-K``."""
        kind, _, number = text.partition("-")
        return cls(last_only=kind == "last", suffix=int(number) if kind == "suffix" else None)


@attrs.frozen(eq=False)
class Columns:
    """What the rows of a file say of themselves.

    Attributes:
        lines: (rows,) int64, line numbers from 1.
        sources: names of sources.
        source: (rows,) int32, places in ``sources``.
        ratings: (rows,) float32, 1 to 5, ``NO_RATING`` or ``UNUSABLE_RATING``.
        contexts: what category, lane and task family say, in lower case, each followed by a line feed.
        context: (rows,) int32, places in ``contexts``.
    """

    lines: NDArray[np.int64]
    sources: Sequence[str]
    source: NDArray[np.int32]
    ratings: NDArray[np.float32]
    contexts: Sequence[str]
    context: NDArray[np.int32]


@attrs.frozen(eq=False)
class RowTable:
    """The rows of a file that can be used, as tokens.

    Attributes:
        rows: in the file's order.
        columns: what they say of themselves.
        faults: the rows that cannot be used.
    """

    rows: TokenRows
    columns: Columns
    faults: Faults

    def take(self, places: NDArray[np.int64] | NDArray[np.bool_]) -> RowTable:
        """The rows at these places, or where this is true."""
        columns = attrs.evolve(
            self.columns,
            **{name: getattr(self.columns, name)[places] for name in ("lines", "source", "ratings", "context")},
        )
        return attrs.evolve(self, rows=self.rows.take(places), columns=columns)


def table_in_memory(rows: Iterable[Row], encoder: Encoder, supervision: Supervision, faults: Faults) -> RowTable:
    """Encode rows; those that cannot be rendered or encoded are booked in ``faults``."""
    files = {name: io.BytesIO() for name in COLUMNS}
    names = write_columns(rows, encoder, supervision, faults, files)
    return table_of({name: np.frombuffer(files[name].getvalue(), COLUMNS[name]) for name in COLUMNS}, *names, faults)


def table_of(
    columns: Mapping[str, NDArray[Any]], sources: Sequence[str], contexts: Sequence[str], faults: Faults
) -> RowTable:
    """The table that these columns are, in memory or mapped; nothing of them is copied."""
    offsets = columns["offsets"]
    rows = TokenRows(columns["tokens"], columns["mask"], offsets[:-1], offsets[1:], columns["trained"])
    told = {name: columns[name] for name in ("lines", "source", "ratings", "context")}
    return RowTable(rows, Columns(sources=sources, contexts=contexts, **told), faults)


def write_columns(
    rows: Iterable[Row],
    encoder: Encoder,
    supervision: Supervision,
    faults: Faults,
    files: Mapping[str, IO[bytes]],
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Encode rows into files.

    Args:
        rows: from ``corpus.rows``.
        encoder: of the model.
        supervision: what is trained on.
        faults: where rows are booked that cannot be rendered or encoded.
        files: one for each of ``COLUMNS``.

    Returns:
        (names of sources, what contexts say), each once.
    """
    sources: dict[str, int] = {}
    contexts: dict[str, int] = {}
    end = 0
    files["offsets"].write(bytes(COLUMNS["offsets"].itemsize))
    for some, tokens in _encoded(rows, encoder, supervision, faults):
        told = {
            "tokens": tokens.input_ids,
            "mask": tokens.supervised,
            "offsets": end + tokens.ends,
            "trained": tokens.trained,
            "lines": [row.line for row in some],
            "source": [sources.setdefault(_group(row.source), len(sources)) for row in some],
            "ratings": [_rating(row.metadata.get("rating")) for row in some],
            "context": [contexts.setdefault(_context(row.metadata), len(contexts)) for row in some],
        }
        for name, dtype in COLUMNS.items():
            files[name].write(np.asarray(told[name], dtype).data)
        end += len(tokens.input_ids)
    return tuple(sources), tuple(contexts)


def _encoded(
    rows: Iterable[Row], encoder: Encoder, supervision: Supervision, faults: Faults
) -> Iterator[tuple[list[Row], TokenRows]]:
    """The rows that can be encoded, with their tokens, some at a time, in order."""
    # The tokenizer leaves the interpreter to others while it works.
    with _no_collection(), ThreadPoolExecutor(1) as beside:
        earlier: tuple[list[Row], Future[tuple[TokenRows, dict[int, Fault]]]] | None = None
        for some, rendered in _rendered(rows, encoder.chat, supervision, faults):
            begun = some, beside.submit(encoder.lay_out, rendered)
            if earlier is not None:
                yield _usable(*earlier, supervision, faults)
            earlier = begun
        if earlier is not None:
            yield _usable(*earlier, supervision, faults)


@contextmanager
def _no_collection() -> Iterator[None]:
    """No search for cycles: rows form none, and it would walk through a framework's million objects every time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _rendered(
    rows: Iterable[Row], chat: Chat, supervision: Supervision, faults: Faults
) -> Iterator[tuple[list[Row], list[Rendered]]]:
    """Rows and their texts, so many at a time that what the tokenizer makes of them stays small."""
    some: list[Row] = []
    texts: list[Rendered] = []
    characters = 0
    for row in rows:
        try:
            rendered = chat.render(row.turns, row.tools, last_only=supervision.last_only)
        except Fault as fault:
            faults.add(fault, row.line)
            continue
        some.append(row)
        texts.append(rendered)
        characters += len(rendered.text)
        if len(some) == _ROWS_AT_A_TIME or characters >= _CHARACTERS_AT_A_TIME:
            yield some, texts
            some, texts, characters = [], [], 0
    if some:
        yield some, texts


def _usable(
    rows: list[Row], begun: Future[tuple[TokenRows, dict[int, Fault]]], supervision: Supervision, faults: Faults
) -> tuple[list[Row], TokenRows]:
    tokens, wrong = begun.result()
    for place, fault in wrong.items():
        faults.add(fault, rows[place].line)
    usable = [row for place, row in enumerate(rows) if place not in wrong] if wrong else rows
    return usable, tokens if supervision.suffix is None else _suffixes(tokens, supervision.suffix)


def _suffixes(tokens: TokenRows, most: int) -> TokenRows:
    """The rows with only so many supervised tokens left, counted from the end of each."""
    supervised = tokens.supervised.copy()
    for start, end in zip(tokens.starts, tokens.ends, strict=True):
        row = supervised[start:end]
        row[np.flatnonzero(row)[:-most]] = False
    return TokenRows.laid_out(tokens.input_ids, supervised, tokens.lengths)


def _group(source: str) -> str:
    """What rows are counted by: the project or kind in front of the place that a row's source names."""
    return _PLACE.split(source, maxsplit=1)[0] or _UNNAMED


def _context(metadata: Mapping[str, Any]) -> str:
    return "".join([f"{metadata.get(key) or ''}\n" for key in _SEARCHED]).lower() if metadata else _SAYS_NOTHING


def _rating(rating: object) -> float:
    if rating is None:
        return NO_RATING
    usable = isinstance(rating, int | float) and not isinstance(rating, bool) and 1 <= rating <= 5
    return float(rating) if usable else UNUSABLE_RATING  # type: ignore[arg-type]
