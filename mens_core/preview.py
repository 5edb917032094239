"""What training will see of its rows: which tokens it is trained on, how long rows are, what is lost and why.

Everything comes from the code that a run reads its rows with, and what is made here is what a run finds made.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import attrs
import numpy as np

from mens_core.artifacts.files import sha256_file
from mens_core.contract import FineTuneContract
from mens_core.corpus.data_dir import find_data
from mens_core.corpus.faults import Faults
from mens_core.corpus.row import ROLES
from mens_core.corpus.rows import sample_rows
from mens_core.errors import ContractError, DataError
from mens_core.gates import refuse_failed
from mens_core.report import lengths_lines
from mens_core.survey import look_at_base
from mens_core.text.encode import Encoder
from mens_core.text.table import RowTable, Supervision, table_in_memory
from mens_core.text.tokens import TokenRow
from mens_core.training.data import choose, load_rows, row_table

__all__ = ["Preview", "ShownRow", "preview_rows"]

_SAMPLED_ROWS = 256
_BINS = 12


@attrs.frozen(kw_only=True)
class ShownRow:
    """A row as training sees it.

    Attributes:
        line: of the file, from 1.
        source: what it is counted by.
        pieces: (text, whether it is trained on), in order; together they are the whole row.
        tokens: of the row.
        trained: of these, how many are trained on.
    """

    line: int
    source: str
    pieces: tuple[tuple[str, bool], ...]
    tokens: int
    trained: int


@attrs.frozen(kw_only=True)
class Preview:
    """A file of rows, as training sees it.

    Attributes:
        file: of the rows.
        base: whose tokenizer and template are used.
        template: ``chatml`` or ``template``.
        shown: some rows.
        counters: of the run that would be, as the manifest keeps them; empty if it would be refused.
        roles: role → share of the tokens of a sample; ``template`` is the rest: tags, role names, calls, thoughts
            and what the template says by itself.
        histogram: (longest row of the bin in tokens, rows), from the shortest.
        longest: the longest row, in tokens.
        refusal: why a run would be refused; empty if it would not.
        warnings: what one should know although nothing is wrong.
    """

    file: Path
    base: str
    template: str
    shown: tuple[ShownRow, ...]
    counters: Mapping[str, int]
    roles: Mapping[str, float]
    histogram: tuple[tuple[int, int], ...]
    longest: int
    refusal: str
    warnings: tuple[str, ...]


def preview_rows(
    contract: FineTuneContract,
    *,
    first: int = 3,
    lines: Sequence[int] = (),
    news: Callable[[int], None] | None = None,
) -> Preview:
    """Read the rows of a contract and look at them.

    Args:
        contract: of a run; it needs no output folder.
        first: rows to show from the start of the file, where no line is asked for.
        lines: lines of the file whose rows are shown.
        news: told now and then how many rows have been read.

    Raises:
        ContractError: if there is no data folder.
        ModelError, GateError: if the base has no tokenizer that fits.
        DataError: if no row can be used, or a line that is asked for has none.
    """
    if contract.data.data_dir is None:
        raise ContractError("data_dir is required", fix="python -m mens_core data show --data-dir DIR")
    base = look_at_base(contract, weights=False)
    refuse_failed(base.gates)
    file = find_data(contract.data.data_dir).train
    if not file.is_file():
        raise DataError(
            "there are no rows to look at",
            where=file,
            fix="write some with: python -m mens_core corpus pairs SOURCES --output DIR",
        )
    table = row_table(file, sha256_file(file), contract, base.encoder, news=news)
    if not len(table.rows):
        table.faults.check()
    counters, refusal, warnings = _outcome(file, contract, base.encoder)
    # A row that is asked for by its line is shown whether it is trained on or not.
    seen = table if lines else _trained_on(table, contract)
    places = _places(table, lines, file) if lines else range(min(first, len(seen.rows)))
    return Preview(
        file=file,
        base=base.name,
        template=base.encoder.chat.name,
        shown=tuple(_shown(seen, place, base.encoder) for place in places),
        counters=counters,
        roles=_roles(file, base.encoder),
        histogram=_histogram(seen),
        longest=int(seen.rows.lengths.max()),
        refusal=refusal,
        warnings=(*base.encoder.chat.notes, *warnings),
    )


def _trained_on(table: RowTable, contract: FineTuneContract) -> RowTable:
    """The rows that rating and context leave; all, where they leave none, which the refusal says."""
    try:
        return choose(table, contract.data)[0]
    except DataError:
        return table


def _outcome(file: Path, contract: FineTuneContract, encoder: Encoder) -> tuple[dict[str, int], str, tuple[str, ...]]:
    """(counters, refusal, warnings) of a run over the rows, which are in the cache by now."""
    try:
        read = load_rows(file, sha256_file(file), contract, encoder)
    except DataError as error:
        return {}, str(error), ()
    skipped = [f"{count} rows are left out: {kind}" for kind, count in read.skipped.items()]
    return read.counters(), "", (*skipped, *lengths_lines(read.ledger.as_dict()))


def _places(table: RowTable, lines: Sequence[int], file: Path) -> list[int]:
    known = table.columns.lines
    places = np.searchsorted(known, lines).clip(max=len(known) - 1)
    absent = [line for line, place in zip(lines, places, strict=True) if known[place] != line]
    if absent:
        raise DataError(
            f"line {absent[0]} holds no row that can be used",
            where=file,
            fix="python -m mens_core corpus validate says what is wrong with it",
        )
    return [int(place) for place in places]


def _shown(table: RowTable, place: int, encoder: Encoder) -> ShownRow:
    row, columns = table.rows[place], table.columns
    return ShownRow(
        line=int(columns.lines[place]),
        source=columns.sources[columns.source[place]],
        pieces=tuple(_pieces(row, encoder)),
        tokens=len(row.input_ids),
        trained=int(table.rows.trained[place]),
    )


def _pieces(row: TokenRow, encoder: Encoder) -> list[tuple[str, bool]]:
    """The row's tokens as text again, cut where training begins and ends."""
    trained = row.supervised.copy()
    trained[0] = False
    changes = np.flatnonzero(np.diff(trained)) + 1
    cuts = pairwise([0, *changes.tolist(), len(trained)])
    decode = encoder.tokenizer.decode
    return [
        (decode(row.input_ids[start:end].tolist(), skip_special_tokens=False), bool(trained[start]))
        for start, end in cuts
    ]


def _roles(file: Path, encoder: Encoder) -> dict[str, float]:
    """The share of every role's own words in the tokens of a sample, each of its texts tokenised by itself."""
    rows, _, _ = sample_rows(file, _SAMPLED_ROWS)
    sampled = table_in_memory(rows, encoder, Supervision(), Faults(file))
    total, counts = sampled.rows.tokens, Counter[str]()
    usable = set(sampled.columns.lines.tolist())
    for turn in (turn for row in rows if row.line in usable for turn in row.turns):
        counts[turn.role] += len(encoder.tokenizer.encode(turn.content, add_special_tokens=False).ids)
    shares = {role: counts[role] / total for role in ROLES if counts[role]}
    return shares | {"template": max(0.0, 1.0 - sum(shares.values()))} if total else {}


def _histogram(table: RowTable) -> tuple[tuple[int, int], ...]:
    lengths = table.rows.lengths
    width = max(1, -(-int(lengths.max()) // _BINS))
    counts = np.bincount((lengths - 1) // width)
    return tuple((int((number + 1) * width), int(count)) for number, count in enumerate(counts))
