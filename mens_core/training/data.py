"""A run's rows as tokens, all of them or a sample to plan with: read, checked, chosen, made to fit."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import attrs
import numpy as np
from numpy.typing import NDArray

from mens_core.contract import FineTuneContract
from mens_core.corpus.faults import Faults
from mens_core.corpus.row import Row
from mens_core.corpus.rows import iter_rows, sample_rows
from mens_core.errors import DataError
from mens_core.plan import Workload
from mens_core.sections import DataSpec
from mens_core.text.cache import cached_table
from mens_core.text.encode import Encoder
from mens_core.text.overlong import LengthLedger, fit_rows
from mens_core.text.table import NO_RATING, UNUSABLE_RATING, Columns, RowTable, Supervision, table_in_memory
from mens_core.text.tokens import TokenRows
from mens_core.text.workload import workload

__all__ = ["ReadRows", "RowSample", "check_enough", "choose", "load_rows", "row_table", "sample"]

# Rows that are tokenised to learn how long a run's rows are; 256 of them take a few hundredths of a second.
_SAMPLED_ROWS = 256
# The largest share of rows that may be faulty, where they may be skipped and nothing else was said.
_MOST_SKIPPED_BY_DEFAULT = 0.05
_ROWS_BETWEEN_NEWS = 10_000


@attrs.frozen(kw_only=True)
class ReadRows:
    """The rows that are trained on, and the books of those that are not.

    Attributes:
        rows: in the file's order.
        ledger: what their length costs.
        skipped: kind of fault → rows that have it and were left out.
        rows_dropped_rating: rows rated too low.
        rows_dropped_filter: rows of another context.
    """

    rows: TokenRows
    ledger: LengthLedger
    skipped: Mapping[str, int]
    rows_dropped_rating: int
    rows_dropped_filter: int

    def counters(self) -> dict[str, int]:
        """The books in numbers, as the manifest keeps them."""
        lost = self.ledger.total
        return {
            "rows": len(self.rows),
            "tokens": self.rows.tokens,
            "supervised_tokens": int(self.rows.trained.sum()),
            "rows_dropped_faulty": sum(self.skipped.values()),
            "rows_dropped_rating": self.rows_dropped_rating,
            "rows_dropped_filter": self.rows_dropped_filter,
            "rows_dropped_overlong": lost.rows_dropped_overlong,
            "rows_dropped_unsupervised": lost.rows_dropped_unsupervised,
            "rows_truncated": lost.rows_truncated,
            "rows_split": lost.rows_split,
            "supervised_tokens_cut": lost.supervised_tokens_cut,
            "supervised_tokens_dropped": lost.supervised_tokens_dropped,
        }


def load_rows(
    path: Path,
    content: str,
    contract: FineTuneContract,
    encoder: Encoder,
    *,
    news: Callable[[int], None] | None = None,
) -> ReadRows:
    """Read, check, choose and encode every row of a file.

    Args:
        path: of the file.
        content: its sha256.
        contract: says what is trained on.
        encoder: of the model.
        news: told now and then how many rows have been read.

    Raises:
        DataError: if rows are faulty, too many are left out, or none stays.
    """
    data = contract.data
    table = row_table(path, content, contract, encoder, news=news)
    table.faults.check(_most_faulty(data))
    chosen, dropped = choose(table, data)
    rows, ledger = fit_rows(
        chosen.rows,
        chosen.columns.source,
        chosen.columns.sources,
        seq_len=data.seq_len,
        policy=data.on_overlong,
        side=data.truncation_side,
    )
    found = ReadRows(rows=rows, ledger=ledger, skipped=table.faults.by_kind(), **dropped)
    _check_share(path, found, table.faults.lines, data.max_skip_rate)
    return found


def row_table(
    path: Path,
    content: str,
    contract: FineTuneContract,
    encoder: Encoder,
    *,
    news: Callable[[int], None] | None = None,
) -> RowTable:
    """Every row of a file that can be used, whatever becomes of it; arguments as for ``load_rows``."""
    supervision = Supervision.parse(contract.data.supervise)
    return cached_table(path, content, encoder, supervision, functools.partial(_told, path, news))


def check_enough(path: Path, rows: ReadRows, least: int) -> None:
    """Refuse a corpus that is too small.

    Raises:
        DataError: naming both numbers.
    """
    if len(rows.rows) < least:
        raise DataError(
            f"there are {len(rows.rows)} rows to train on", where=path, expected=f"at least {least}, by min_rows"
        )


@attrs.frozen(kw_only=True)
class RowSample:
    """A few rows of a file.

    Attributes:
        sampled: how many lines were read.
        lines: lines of the file.
        faulty: how many of them cannot be used.
        reasoning: how many hold an assistant's reasoning.
        table: those that can be used and are chosen, as tokens.
    """

    sampled: int
    lines: int
    faulty: int
    reasoning: int
    table: RowTable

    @property
    def whole(self) -> bool:
        """Whether these are all rows of the file."""
        return self.sampled == self.lines

    @property
    def source(self) -> str:
        """What the rows are, for people."""
        return "all rows" if self.whole else f"a sample of {self.sampled}"

    def fitted(self, data: DataSpec) -> tuple[TokenRows, LengthLedger]:
        """Those that are trained on, and what their length costs.

        Raises:
            DataError: if no row is left to train on.
        """
        return fit_rows(
            self.table.rows,
            self.table.columns.source,
            self.table.columns.sources,
            seq_len=data.seq_len,
            # Whether too many rows are too long is judged on all of them, when they are read.
            policy="drop" if data.on_overlong in {"auto", "error"} else data.on_overlong,
            side=data.truncation_side,
        )

    def workload(self, contract: FineTuneContract) -> Workload:
        """What a run over the file will compute.

        Raises:
            DataError: if no row of the sample is left to train on.
        """
        rows, _ = self.fitted(contract.data)
        count = max(1, round(self.lines * len(rows) / self.sampled))
        return workload(rows, contract, num_rows=count, source=self.source)


def sample(path: Path, contract: FineTuneContract, encoder: Encoder) -> RowSample:
    """Read a few rows from all over a file.

    Raises:
        DataError: if none of them can be used, or none is to be trained on.
    """
    supervision = Supervision.parse(contract.data.supervise)
    rows, faulty, lines = sample_rows(path, _SAMPLED_ROWS)
    sampled = len(rows) + faulty
    faults = Faults(path)
    faults.lines = sampled
    table = table_in_memory(rows, encoder, supervision, faults)
    try:
        chosen, _ = choose(table, contract.data)
    except DataError:
        if sampled == lines:
            raise
        # Rows that a sample does not show may be there all the same.
        faults, faulty, sampled = Faults(path), 0, lines
        table = table_in_memory(iter_rows(path, faults), encoder, supervision, faults)
        chosen, _ = choose(table, contract.data)
    return RowSample(
        sampled=sampled,
        lines=lines,
        faulty=faulty + faults.count,
        reasoning=sum(any(turn.reasoning for turn in row.turns) for row in rows),
        table=chosen,
    )


def _told(path: Path, news: Callable[[int], None] | None, faults: Faults) -> Iterator[Row]:
    for count, row in enumerate(iter_rows(path, faults), start=1):
        if news is not None and count % _ROWS_BETWEEN_NEWS == 0:
            news(count)
        yield row


def _most_faulty(data: DataSpec) -> float:
    if data.on_bad_row == "error":
        return 0.0
    return _MOST_SKIPPED_BY_DEFAULT if data.max_skip_rate is None else data.max_skip_rate


def choose(table: RowTable, data: DataSpec) -> tuple[RowTable, dict[str, int]]:
    """Leave out rows that are rated too low or belong to another context, and count them.

    Raises:
        DataError: if no row is left, or ratings that are to choose cannot be used.
    """
    if data.min_rating is None and data.context_filter is None and len(table.rows):
        return table, {"rows_dropped_rating": 0, "rows_dropped_filter": 0}
    columns = table.columns
    low = np.zeros(len(table.rows), np.bool_)
    if data.min_rating is not None:
        _check_ratings(columns)
        low = (columns.ratings < data.min_rating) & (columns.ratings != NO_RATING)
    other = ~low & ~_mentions(columns, data.context_filter)
    chosen = ~low & ~other
    if not chosen.any():
        if not len(chosen):
            table.faults.check()
        raise DataError(
            "no row is left to train on",
            where=f"{len(chosen)} rows: {int(low.sum())} rated too low, {int(other.sum())} of another context",
            fix="lower --min-rating, or widen --context-filter",
        )
    kept = table if chosen.all() else table.take(chosen)
    return kept, {"rows_dropped_rating": int(low.sum()), "rows_dropped_filter": int(other.sum())}


def _check_ratings(columns: Columns) -> None:
    unusable = np.flatnonzero(columns.ratings == UNUSABLE_RATING)
    if unusable.size:
        lines = ", ".join(map(str, columns.lines[unusable[:5]]))
        raise DataError(
            f"{_rows(len(unusable))} no usable rating, by which rows are to be chosen",
            where=f"line {lines}",
            expected="1 to 5, or none",
        )


def _rows(count: int) -> str:
    return "1 row has" if count == 1 else f"{count} rows have"


def _mentions(columns: Columns, needle: str | None) -> NDArray[np.bool_]:
    if needle is None:
        return np.ones(len(columns.context), np.bool_)
    found = np.asarray([needle.lower() in text for text in columns.contexts], np.bool_)
    return found[columns.context]


def _check_share(path: Path, found: ReadRows, lines: int, most: float | None) -> None:
    # Of a split row every part without supervision counts, so the share is at most what this says.
    reasons = {name: count for name, count in found.counters().items() if name.startswith("rows_dropped") and count}
    share = min(1.0, sum(reasons.values()) / lines)
    if most is not None and share > most:
        raise DataError(
            f"{share:.1%} of the rows are left out",
            where=f"{path}: {reasons}",
            expected=f"at most {most:.1%}, by max_skip_rate",
        )
