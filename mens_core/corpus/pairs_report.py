"""What ``corpus pairs`` wrote and what it left out: for a reader, and for ``metadata.json``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from mens_core.corpus.pair import Tally

__all__ = ["PARTS", "PairsReport", "tally_lines"]

SCHEMA_VERSION = "mens.corpus.pairs.v2"
PARTS = ("train", "eval")


@attrs.frozen(kw_only=True)
class PairsReport:
    """What was written and what was not.

    Attributes:
        output: the folder.
        rows: number of rows by part, ``train`` and ``eval``.
        rows_by_category: the same for each category.
        rows_by_difficulty: number of rows, both parts together, for each difficulty from 1 to 10 that occurs.
        files_read: files that were read and parsed.
        files_skipped: files and folders left out, by reason.
        duplicates_dropped: rows left out as duplicates, by reason: equal, or nearly equal.
        rows_dropped: rows left out, by reason; duplicates are not among them.
    """

    output: Path
    rows: Mapping[str, int]
    rows_by_category: Mapping[str, Mapping[str, int]]
    rows_by_difficulty: Mapping[int, int]
    files_read: int
    files_skipped: Mapping[str, Tally]
    duplicates_dropped: Mapping[str, Tally]
    rows_dropped: Mapping[str, Tally]

    def text(self) -> str:
        """The report as lines for a reader."""
        train, held_out = (self.rows[part] for part in PARTS)
        rows = f"{train:,} rows to train on, {held_out:,} held out"
        lines = [f"{self.output}: {rows}; {self.files_read:,} files read"]
        lines += [f"{sum(parts.values()):>10,}  {name}" for name, parts in self.rows_by_category.items()]
        dropped = [*tally_lines(self.duplicates_dropped), *tally_lines(self.rows_dropped)]
        files = tally_lines(self.files_skipped)
        lines += ["rows left out:", *dropped] if dropped else []
        lines += ["files and folders left out:", *files] if files else []
        return "\n".join(lines)

    def metadata(self, settings: Mapping[str, Any], sha256: Mapping[str, str]) -> dict[str, Any]:
        """What ``metadata.json`` holds.

        Args:
            settings: everything that was set, but for paths.
            sha256: of each file of rows, by its name.
        """
        return {
            "schema_version": SCHEMA_VERSION,
            "generated_by": "mens_core corpus pairs",
            # It decides what parses, and so which rows there are.
            "compiler_version": f"Python {sys.version_info.major}.{sys.version_info.minor}",
            "total_pairs": sum(self.rows.values()),
            "negative_pairs": sum(self.rows_by_category.get("error_correction", {}).values()),
            "curriculum_ordered": settings["curriculum"],
            "rows": dict(self.rows),
            "rows_by_category": self.rows_by_category,
            "rows_by_difficulty": dict(self.rows_by_difficulty),
            "duplicates_dropped": _as_json(self.duplicates_dropped),
            "rows_dropped": _as_json(self.rows_dropped),
            "files_read": self.files_read,
            "files_skipped": _as_json(self.files_skipped),
            "settings": dict(settings),
            "sha256": dict(sha256),
        }


def tally_lines(tallies: Mapping[str, Tally]) -> list[str]:
    """One line for each reason: how often, and where first."""
    return [f"{tally.count:>10,}  {reason} (first: {tally.examples[0]})" for reason, tally in tallies.items()]


def _as_json(tallies: Mapping[str, Tally]) -> dict[str, Any]:
    return {reason: attrs.asdict(tally) for reason, tally in tallies.items()}
