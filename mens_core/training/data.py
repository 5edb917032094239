"""A run's rows as tokens, all of them or a sample to plan with."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import attrs

from mens_core.contract import FineTuneContract
from mens_core.corpus.row import Row
from mens_core.corpus.rows import read_rows, sample_rows
from mens_core.corpus.select import Selection, select_rows
from mens_core.errors import DataError
from mens_core.plan import Workload
from mens_core.text.encode import EncodedRows, Encoder, TokenRow, encode_rows
from mens_core.text.workload import workload

__all__ = ["RowSample", "check_enough", "load_rows", "sample"]

# Rows that are tokenised to learn how long a run's rows are; 256 of them take a few hundredths of a second.
_SAMPLED_ROWS = 256


def load_rows(path: Path, contract: FineTuneContract, encoder: Encoder) -> EncodedRows:
    """Read, check, select and encode every row of a file.

    Raises:
        DataError: if a row is faulty, too many are left out, or too few stay.
    """
    data = contract.data
    rows = read_rows(path)
    selection = _select(rows, contract)
    encoded = encode_rows(selection.rows, encoder, seq_len=data.seq_len, on_overlong=data.on_overlong)
    left_out = {"rows_dropped_rating": selection.rows_dropped_rating}
    left_out |= {"rows_dropped_filter": selection.rows_dropped_filter}
    encoded = attrs.evolve(encoded, left_out=left_out)
    share = 1 - len(encoded.rows) / len(rows)
    if data.max_skip_rate is not None and share > data.max_skip_rate:
        reasons = {name: count for name, count in encoded.counters().items() if name.startswith("rows_dropped")}
        raise DataError(
            f"{share:.1%} of the rows are left out",
            where=f"{path}: {reasons}",
            expected=f"at most {data.max_skip_rate:.1%}, by max_skip_rate",
        )
    return encoded


def check_enough(path: Path, rows: EncodedRows, least: int) -> None:
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
        faulty: how many of them cannot be used.
        lines: lines of the file.
        encode: (longest row, what becomes of longer ones) → those of the rows that are trained on, as tokens.
    """

    sampled: int
    faulty: int
    lines: int
    encode: Callable[[int, str], Sequence[TokenRow]]

    @property
    def whole(self) -> bool:
        """Whether these are all rows of the file."""
        return self.sampled == self.lines

    def workload(self, contract: FineTuneContract) -> Workload:
        """What a run over the file will compute.

        Raises:
            DataError: if no row of the sample is left to train on.
        """
        policy = contract.data.on_overlong
        # Whether too many rows are too long is judged on all of them, when they are read.
        kept = self.encode(contract.data.seq_len, "drop" if policy in {"auto", "error"} else policy)
        count = max(1, round(self.lines * len(kept) / self.sampled))
        source = "all rows" if self.whole else f"a sample of {self.sampled}"
        return workload(kept, contract.training, num_rows=count, source=source)


def sample(path: Path, contract: FineTuneContract, encoder: Encoder) -> RowSample:
    """Read a few rows from all over a file.

    Raises:
        DataError: if none of them can be used, or none is to be trained on.
    """
    rows, faulty, lines = sample_rows(path, _SAMPLED_ROWS)
    sampled = len(rows) + faulty
    try:
        chosen = _select(rows, contract).rows
    except DataError:
        if sampled == lines:
            raise
        # Rows that a sample does not show may be there all the same.
        rows = read_rows(path)
        chosen, sampled = _select(rows, contract).rows, lines

    @functools.cache
    def encode(seq_len: int, policy: str) -> tuple[TokenRow, ...]:
        return encode_rows(chosen, encoder, seq_len=seq_len, on_overlong=policy).rows

    return RowSample(sampled=sampled, faulty=faulty, lines=lines, encode=encode)


def _select(rows: Sequence[Row], contract: FineTuneContract) -> Selection:
    return select_rows(rows, min_rating=contract.data.min_rating, context_filter=contract.data.context_filter)
