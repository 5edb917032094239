"""``corpus stats``: what is in files of rows."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from mens_core import report
from mens_core.corpus.faults import Faults
from mens_core.corpus.rows import iter_rows
from mens_core.corpus.stats import RowStats
from mens_core.errors import printable

__all__ = ["add_arguments", "run"]

_DESCRIPTION = """\
Counts the rows of all files together: by category, lane, source, rating, difficulty, roles and turns; their characters,
and how many say what an earlier one says."""
_VALUES_SHOWN, _BAR = 10, 40


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``corpus stats``."""
    parser.description = _DESCRIPTION
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="rows: .jsonl, plain, gzip or Zstandard")


def run(arguments: argparse.Namespace) -> int:
    """Count and print; returns the exit status, 0 for success.

    Raises:
        DataError: if a file cannot be read.
    """
    stats, faulty = RowStats(), 0
    for path in arguments.files:
        faults = Faults(path)
        for row in iter_rows(path, faults):
            stats.add(row)
        faulty += faults.count
    report.say(_text(stats, faulty))
    return 0


def _text(stats: RowStats, faulty: int) -> str:
    rows = max(stats.rows, 1)
    facts = [
        ("rows", f"{stats.rows:,}, of which {stats.duplicates:,} say what an earlier one says"),
        ("characters", f"{stats.characters:,}; {stats.characters / rows:,.0f} a row, {_share(stats)} the assistant's"),
        ("turns", ", ".join(f"{count:,} of {turns}" for turns, count in sorted(stats.turns.items())[:_VALUES_SHOWN])),
    ]
    if faulty:
        facts.append(("unusable", f"{faulty:,} lines more; python -m mens_core corpus validate says why"))
    lines = [f"{label:<12}{text}" for label, text in facts]
    for name, counts in stats.counts.items():
        if set(counts) != {"-"}:
            lines += ["", *_counted(name, counts, rows)]
    return "\n".join([*lines, "", *_histogram(stats.lengths)])


def _share(stats: RowStats) -> str:
    return f"{stats.supervised / max(stats.characters, 1):.0%}"


def _counted(name: str, counts: Mapping[str, int], rows: int) -> list[str]:
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    shown = [(printable(value), f"{count:,}", f"{count / rows:.1%}") for value, count in ranked[:_VALUES_SHOWN]]
    more = ranked[_VALUES_SHOWN:]
    rest = sum(count for _, count in more)
    shown += [(f"{len(more):,} more", f"{rest:,}", f"{rest / rows:.1%}")] if more else []
    return [report.table((name, "rows", "share"), shown)]


def _histogram(lengths: Mapping[int, int]) -> list[str]:
    most = max(lengths.values(), default=1)
    buckets = range(min(lengths).bit_length() - 1, max(lengths).bit_length()) if lengths else range(0)
    rows = [(1 << power, lengths.get(1 << power, 0)) for power in buckets]
    bars = [(f"{length:,}", f"{count:,}", "█" * -(-count * _BAR // most)) for length, count in rows]
    return [report.table(("characters up to", "rows", ""), bars)] if bars else []
