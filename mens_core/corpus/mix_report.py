"""What a mix took from where, what it left out, and the arithmetic of its shares."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from mens_core.corpus.faults import FaultKind

__all__ = ["MixReport", "SourceReport"]

SCHEMA_VERSION = "mens.corpus.mix.v1"


@attrs.define(kw_only=True)
class SourceReport:
    """One source, filled in as it is read.

    Attributes:
        path: as the mix names it, relative to the mix's folder.
        record_format: of its lines; None for rows.
        weight: as asked for.
        optional: whether it may give nothing.
        state: ``used``, ``missing``, ``empty``, or ``nothing left`` if no row of it reached the rows to train on.
        sha256: of the file; empty if it is missing.
        lines: of the file.
        bad_rows: lines that are no row, by kind.
        dropped: usable rows that were left out, by reason: ``lane``, ``sample_rate``, ``duplicate``.
        held_out: rows of it in the held-out part.
        available: rows of it that can be trained on.
        share_asked: of the rows to train on, by its weight, from 0 to 1.
        rows: that it gives to train on, repeats counted.
        repeats: how often each of its rows is given, on average; below 1 it is sampled.
        share: of the rows to train on that it has, from 0 to 1.
    """

    path: str
    record_format: str | None
    weight: float
    optional: bool
    state: str = "used"
    sha256: str = ""
    lines: int = 0
    bad_rows: tuple[FaultKind, ...] = ()
    dropped: dict[str, int] = attrs.field(factory=lambda: {"lane": 0, "sample_rate": 0, "duplicate": 0})
    held_out: int = 0
    available: int = 0
    share_asked: float = 0.0
    rows: int = 0
    repeats: float = 0.0
    share: float = 0.0


@attrs.frozen(kw_only=True)
class MixReport:
    """What was written.

    Attributes:
        config: the file of the mix.
        output: the rows to train on.
        eval_output: the rows held out; None if there are none.
        report: this report as JSON.
        seed: of samples, order and held-out part.
        eval_fraction: share of the rows that was to be held out.
        dedup: whether duplicates were left out.
        total_rows: rows to train on that were asked for; None if the weights decided.
        sources: in the order of the mix.
        rows_in: lines of all sources.
        rows: rows to train on, repeats counted.
        eval_rows: rows held out.
        lanes: lane → rows to train on.
        overlap: rows read back from what was written, and how many ask or answer what a held-out row does: none.
        labels: short answers that many rows share and that keep no rows together.
        warnings: what a reader of the mix should know.
        sha256: of the files written, by name.
    """

    config: Path
    output: Path
    eval_output: Path | None
    report: Path
    seed: int
    eval_fraction: float
    dedup: bool
    total_rows: int | None
    sources: tuple[SourceReport, ...]
    rows_in: int
    rows: int
    eval_rows: int
    lanes: Mapping[str, int]
    overlap: Mapping[str, int]
    labels: int
    warnings: tuple[str, ...]
    sha256: Mapping[str, str]

    def as_dict(self) -> dict[str, Any]:
        """The report as it is written beside the rows."""

        def plain(_: object, __: object, value: Any) -> Any:
            return str(value) if isinstance(value, Path) else value

        return {"schema_version": SCHEMA_VERSION, **attrs.asdict(self, value_serializer=plain)}
