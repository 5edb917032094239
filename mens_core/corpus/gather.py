"""The sources of a mix, read one after the other into one spool."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from mens_core.corpus.faults import Faults
from mens_core.corpus.lanes import in_lane
from mens_core.corpus.marks import Apart, content_mark
from mens_core.corpus.mix_config import MixConfig, MixSource
from mens_core.corpus.mix_report import SourceReport
from mens_core.corpus.records import row_of_record
from mens_core.corpus.row import Row
from mens_core.corpus.rows import iter_rows
from mens_core.errors import DataError

__all__ = ["Gathered", "gather"]


class Gathered:
    """Rows in a spool, and what is known of each.

    Args:
        spool: an empty file to write and read.
        reports: one for each source.
    """

    def __init__(self, spool: IO[bytes], reports: list[SourceReport]) -> None:
        self._spool = spool
        self._ends, self._lanes = array("Q", [0]), array("L")
        #: Number of the source of each row.
        self.sources = array("L")
        self.reports, self.apart = reports, Apart()
        #: Lanes of all usable rows, those left out for their lane among them; lane → its number.
        self.lanes_seen: dict[str, int] = {}
        #: What is wrong with the sources.
        self.problems: list[str] = []
        self._contents: set[bytes] = set()

    def add(self, row: Row, source: int, *, content: bytes) -> None:
        """Take in a row."""
        line = json.dumps(row.record(), ensure_ascii=False).encode() + b"\n"
        self._spool.write(line)
        self._ends.append(self._ends[-1] + len(line))
        self._lanes.append(self.lanes_seen[row.metadata["lane"]])
        self.sources.append(source)
        self.apart.add(row, content)

    def is_new(self, content: bytes) -> bool:
        """Whether no row of this content came before; from now on one has."""
        if content in self._contents:
            return False
        self._contents.add(content)
        return True

    def line(self, row: int) -> bytes:
        """A row as it is written, with its line feed."""
        self._spool.seek(self._ends[row])
        return self._spool.read(self._ends[row + 1] - self._ends[row])

    def lanes(self, rows: Sequence[int]) -> dict[str, int]:
        """How many of the rows are in which lane."""
        names, counts = list(self.lanes_seen), Counter(self._lanes[row] for row in rows)
        return dict(sorted((names[lane], count) for lane, count in counts.items()))


def gather(config: MixConfig, folder: Path, spool: IO[bytes], *, most: float) -> Gathered:
    """Read every source of a mix.

    Args:
        config: what is mixed.
        folder: of the mix; reports name sources relative to it.
        spool: an empty file to write and read.
        most: largest share of a source's lines that may be faulty, from 0 to 1.

    Returns:
        The rows that are used; problems of the sources are in it and not raised, so that all are told together.
    """
    reports = [
        SourceReport(
            path=_name(source.path, folder),
            record_format=source.record_format,
            weight=source.weight,
            optional=source.optional,
        )
        for source in config.sources
    ]
    gathered = Gathered(spool, reports)
    for number, source in enumerate(config.sources):
        if not source.path.exists():
            reports[number].state = "missing"
            continue
        try:
            _read(config, number, gathered, most)
        except DataError as error:
            gathered.problems.append(str(error).replace("\n", "\n  "))
    return gathered


def _name(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)


def _read(config: MixConfig, number: int, gathered: Gathered, most: float) -> None:
    source, report = config.sources[number], gathered.reports[number]
    faults = Faults(source.path)

    def read(record: Mapping[str, Any], line: int) -> Row:
        return in_lane(row_of_record(source.record_format, record, line))

    try:
        for row in iter_rows(source.path, faults, read):
            content = content_mark(row)
            reason = _why_not(row, content, config, source, gathered)
            if reason:
                report.dropped[reason] += 1
            else:
                gathered.add(row, number, content=content)
    except DataError:
        if faults.lines or not source.path.is_file():
            raise
        report.state = "empty"
    with source.path.open("rb") as file:
        report.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    report.lines, report.bad_rows = faults.lines, faults.kinds()
    faults.check(most)


def _why_not(row: Row, content: bytes, config: MixConfig, source: MixSource, gathered: Gathered) -> str | None:
    lane = row.metadata["lane"]
    gathered.lanes_seen.setdefault(lane, len(gathered.lanes_seen))
    if (config.include_lanes and lane not in config.include_lanes) or lane in config.exclude_lanes:
        return "lane"
    if source.sample_rate < 1 and not _is_sampled(content, source.sample_rate, config.seed):
        return "sample_rate"
    return "duplicate" if config.dedup and not gathered.is_new(content) else None


def _is_sampled(content: bytes, rate: float, seed: int) -> bool:
    digest = hashlib.blake2b(f"sample:{seed}:".encode() + content, digest_size=8).digest()
    return int.from_bytes(digest) / 2**64 < rate
