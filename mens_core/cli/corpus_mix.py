"""``corpus mix``: rows of several sources in the shares that were asked for."""

from __future__ import annotations

import argparse
from pathlib import Path

from mens_core import report
from mens_core.corpus.mix import mix
from mens_core.corpus.mix_config import DEFAULT_MIX
from mens_core.corpus.mix_report import MixReport, SourceReport

__all__ = ["add_arguments", "run"]

_DESCRIPTION = """\
Mixes files of rows as a YAML file says:

  sources:
    - {path: train.jsonl, weight: 3}
    - {path: traces.jsonl, weight: 1, record_format: tool_trace, optional: true}
  output: mixed/train.jsonl

A weight is a share of the rows to train on: three quarters and one quarter here. The source with the most rows for
its weight gives each of them once, the others repeat theirs; total_rows sets another size. Further keys: seed,
eval_fraction, dedup, include_lanes, exclude_lanes; of a source: sample_rate. Paths are relative to the YAML file.

Beside the output lie eval.jsonl, rows held out by content, and <stem>.mix_report.json, with what was left out and the
arithmetic. The same files and seed give the same bytes."""

_REASONS = {"lane": "of another lane", "sample_rate": "by sample_rate", "duplicate": "equal to an earlier row"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``corpus mix``."""
    parser.description = _DESCRIPTION
    parser.add_argument(
        "--config",
        type=Path,
        default=DEFAULT_MIX,
        metavar="FILE",
        help="the mix; without it the example that comes with the package: %(default)s",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="rows to train on, ending in .jsonl, instead of the mix's output"
    )
    parser.add_argument(
        "--allow-missing-sources",
        action="store_true",
        help="go on when a source is missing, empty or gives nothing; the report says so",
    )
    parser.add_argument(
        "--on-bad-row",
        choices=("error", "skip"),
        default="error",
        help="refuse a source with a faulty row, or leave such rows out (default: %(default)s)",
    )
    parser.add_argument(
        "--max-bad-share",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="with --on-bad-row skip: largest share of a source that may be left out (default: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files that no earlier mix wrote")


def run(arguments: argparse.Namespace) -> int:
    """Mix; returns the exit status, 0 for success.

    Raises:
        DataError: as ``mix`` does.
    """
    mixed = mix(
        arguments.config,
        arguments.output,
        allow_missing_sources=arguments.allow_missing_sources,
        on_bad_row=arguments.on_bad_row,
        max_bad_share=arguments.max_bad_share,
        overwrite=arguments.overwrite,
    )
    report.say(_text(mixed))
    return 0


def _text(mixed: MixReport) -> str:
    header = ("source", "lines", "usable", "weight", "asked", "given", "each", "share")
    lines = [f"{mixed.output}: {mixed.rows:,} rows to train on, {mixed.eval_rows:,} held out", ""]
    lines += [report.table(header, list(map(_columns, mixed.sources))), ""]
    lines += [f"{count:>10,}  {count / mixed.rows:>6.1%}  in lane {lane}" for lane, count in mixed.lanes.items()]
    dropped = [line for source in mixed.sources for line in _dropped(source)]
    lines += ["left out:", *dropped] if dropped else []
    lines += [f"warning: {warning}" for warning in mixed.warnings]
    return "\n".join([*lines, f"report: {mixed.report}"])


def _columns(source: SourceReport) -> tuple[str, ...]:
    return (
        source.path,
        f"{source.lines:,}",
        f"{source.available:,}",
        f"{source.weight:g}",
        f"{source.share_asked:.1%}",
        f"{source.rows:,}",
        f"× {source.repeats:.3g}",
        f"{source.share:.1%}" if source.state == "used" else source.state,
    )


def _dropped(source: SourceReport) -> list[str]:
    left = [f"{count:>10,}  {_REASONS[reason]}, {source.path}" for reason, count in source.dropped.items() if count]
    bad = [f"{kind.rows:>10,}  {kind.kind}, {source.path} (line {kind.first_lines[0]})" for kind in source.bad_rows]
    return left + bad
