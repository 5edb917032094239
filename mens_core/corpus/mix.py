"""Sources with weights → rows to train on, rows held out, and a report.

    each source ─▶ record format ─▶ check ─▶ lane ─▶ duplicates ─▶ spool on disk
                                                                      │
    split by content ─▶ apportion by weight ─▶ shuffle ─▶ write ─▶ read back: are the parts apart?

The same files and seed give the same bytes. Rows wait in a temporary file, so memory grows by a few hundred bytes
a row. Whatever is left out is counted; nothing is written unless all of it is in order.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import random
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import attrs

from mens_core.atomic import replacing
from mens_core.corpus.faults import Faults
from mens_core.corpus.gather import Gathered, gather
from mens_core.corpus.marks import Overlap, overlap
from mens_core.corpus.mix_config import DEFAULT_MIX, MixConfig, read_mix_config
from mens_core.corpus.mix_report import MixReport
from mens_core.corpus.row import Row
from mens_core.corpus.rows import iter_rows
from mens_core.corpus.shares import Part, draw, parts
from mens_core.errors import DataError

__all__ = ["mix"]

# Repeats of so few rows that a run rather learns them by heart.
_MANY_REPEATS = 10


def mix(
    config_path: str | Path = DEFAULT_MIX,
    output: str | Path | None = None,
    *,
    allow_missing_sources: bool = False,
    on_bad_row: str = "error",
    max_bad_share: float = 0.05,
    overwrite: bool = False,
) -> MixReport:
    """Mix sources as a YAML file says.

    Args:
        config_path: the file of the mix; the example that comes with the package if not given.
        output: the file of rows to write, instead of the one the mix names; ``eval.jsonl`` and
            ``<stem>.mix_report.json`` are written beside it.
        allow_missing_sources: whether every source is optional.
        on_bad_row: ``error`` refuses a source with a faulty row, ``skip`` leaves such rows out and counts them.
        max_bad_share: largest share of a source's rows that may be left out as faulty, from 0 to 1.
        overwrite: whether files that no earlier mix wrote are replaced.

    Returns:
        What was written, and the arithmetic of its shares.

    Raises:
        DataError: if the mix is malformed, or listing every source that is missing, faulty or gives nothing. Nothing
            has been written then.
        OSError: if the disk refuses; what an earlier mix wrote is then still in place.
    """
    config_path = Path(config_path)
    config = read_mix_config(config_path)
    target = _target(config, config_path, Path(output) if output else None, overwrite=overwrite)
    most = {"error": 0.0, "skip": max_bad_share}.get(on_bad_row)
    if most is None or not 0 <= most <= 1:
        raise DataError(
            "settings of the mix are out of range",
            where=f"on_bad_row = {on_bad_row!r}, max_bad_share = {max_bad_share}",
            expected="error or skip, and a share from 0 to 1",
        )
    with tempfile.TemporaryFile() as spool:
        gathered = gather(config, config_path.parent, spool, most=most)
        held_out = gathered.apart.held_out(config.eval_fraction, config.seed)
        train = _by_source(gathered, held_out)
        given = _apportion(config, gathered, train)
        _check(config_path, gathered, given, allow_missing_sources=allow_missing_sources)
        rng = random.Random(config.seed)  # noqa: S311 (an order, no secret)
        order = [rows[place] for rows, part in zip(train, given, strict=True) for place in draw(part, rng)]
        rng.shuffle(order)
        kept = [row for row, out in enumerate(held_out) if out]
        return _write(config, config_path, target, gathered, order, kept)


def _target(config: MixConfig, config_path: Path, output: Path | None, *, overwrite: bool) -> Path:
    target = output or config.output
    if target is None:
        raise DataError("the mix names no output", where=config_path, fix="add output: FILE, or pass --output FILE")
    if target.suffix != ".jsonl" or target.name == "eval.jsonl":
        raise DataError("the output cannot have this name", where=target, expected="a name such as train.jsonl")
    written = [target, target.with_name("eval.jsonl")]
    if taken := [path for path in written if path.resolve() in {source.path.resolve() for source in config.sources}]:
        raise DataError("the output would replace a source", where=taken[0], fix="choose another output")
    present = [path for path in written if path.exists()]
    if present and not _report_of(target).exists() and not overwrite:
        raise DataError(
            "the output holds rows that no mix wrote",
            where=", ".join(map(str, present)),
            fix="choose another --output, or pass --overwrite to replace them",
        )
    return target


def _report_of(target: Path) -> Path:
    return target.with_name(f"{target.stem}.mix_report.json")


def _by_source(gathered: Gathered, held_out: Sequence[bool]) -> list[list[int]]:
    """The rows of each source that are not held out; the reports learn of both."""
    train: list[list[int]] = [[] for _ in gathered.reports]
    for row, (source, out) in enumerate(zip(gathered.sources, held_out, strict=True)):
        gathered.reports[source].held_out += out
        if not out:
            train[source].append(row)
    return train


def _apportion(config: MixConfig, gathered: Gathered, train: Sequence[Sequence[int]]) -> list[Part]:
    given = parts(list(map(len, train)), [source.weight for source in config.sources], config.total_rows)
    total = sum(part.rows for part in given)
    for report, part in zip(gathered.reports, given, strict=True):
        report.available, report.share_asked, report.rows = part.available, part.share, part.rows
        report.repeats, report.share = part.repeats, part.rows / total if total else 0.0
        if report.state == "used" and not part.rows:
            report.state = "nothing left"
    return given


def _check(config_path: Path, gathered: Gathered, given: Sequence[Part], *, allow_missing_sources: bool) -> None:
    problems = list(gathered.problems)
    for report in gathered.reports:
        if report.state != "used" and report.lines == sum(found.rows for found in report.bad_rows) > 0:
            continue  # its faults have been told
        if report.state != "used" and not report.optional and not allow_missing_sources:
            reasons = ", ".join(f"{count} dropped by {reason}" for reason, count in report.dropped.items() if count)
            out = f"{report.held_out} held out" if report.held_out else ""
            why = "; ".join(filter(None, [reasons, out]))
            problems.append(f"{report.path} is {report.state}" + (f": {why}" if why else ""))
    if not sum(part.rows for part in given) and not problems:
        problems.append("no source gives a row")
    if problems:
        raise DataError(
            "\n".join(["nothing was mixed", *(f"  {problem}" for problem in problems)]),
            where=config_path,
            fix="mend the sources, mark as optional: true what may be absent, or pass --allow-missing-sources",
        )


def _warnings(config: MixConfig, gathered: Gathered, kept: Sequence[int]) -> list[str]:
    warnings = [
        f"{report.path}: each row is given {report.repeats:.0f} times; a lower weight repeats less"
        for report in gathered.reports
        if report.repeats >= _MANY_REPEATS
    ]
    for key, lanes in {"include_lanes": config.include_lanes, "exclude_lanes": config.exclude_lanes}.items():
        for lane in lanes:
            if lane not in gathered.lanes_seen:
                close = difflib.get_close_matches(lane, gathered.lanes_seen, n=1)
                hint = f"; did you mean {close[0]}?" if close else ""
                warnings.append(f"{key}: no row is in the lane {lane}{hint}")
    if config.eval_fraction and not kept:
        warnings.append("nothing is held out: all rows share their questions or answers")
    absent = [f"{report.path} is {report.state}" for report in gathered.reports if report.state != "used"]
    return [*warnings, *absent]


def _write(
    config: MixConfig, config_path: Path, target: Path, gathered: Gathered, order: list[int], kept: list[int]
) -> MixReport:
    target.parent.mkdir(parents=True, exist_ok=True)
    report_path, eval_path = _report_of(target), target.with_name("eval.jsonl")
    # The rows to train on take their place last: where they stand, the mix is whole.
    paths = [report_path, *([eval_path] if kept else []), target]
    with replacing(*paths, binary=True) as (report_file, *files):
        sha256 = {target.name: _copy(gathered, order, files[-1])}
        if kept:
            sha256[eval_path.name] = _copy(gathered, kept, files[0])
        found = _read_back(files[-1], files[0] if kept else None, gathered.apart.labels(), len(order) + len(kept))
        report = MixReport(
            config=config_path,
            output=target,
            eval_output=eval_path if kept else None,
            report=report_path,
            seed=config.seed,
            eval_fraction=config.eval_fraction,
            dedup=config.dedup,
            total_rows=config.total_rows,
            sources=tuple(gathered.reports),
            rows_in=sum(source.lines for source in gathered.reports),
            rows=len(order),
            eval_rows=len(kept),
            lanes=gathered.lanes(order),
            overlap=attrs.asdict(found),
            labels=len(gathered.apart.labels()),
            warnings=tuple(_warnings(config, gathered, kept)),
            sha256=sha256,
        )
        report_file.write(json.dumps(report.as_dict(), indent=2, ensure_ascii=False).encode() + b"\n")
        if not kept:
            # What an earlier mix held out is no longer held out.
            eval_path.unlink(missing_ok=True)
    return report


def _copy(gathered: Gathered, order: Sequence[int], file: IO[bytes]) -> str:
    digest = hashlib.sha256()
    for row in order:
        line = gathered.line(row)
        file.write(line)
        digest.update(line)
    file.flush()
    return digest.hexdigest()


def _read_back(train: IO[bytes], held_out: IO[bytes] | None, labels: set[bytes], count: int) -> Overlap:
    """Check what was written: every row can be read, none is missing, the parts are apart."""

    def rows(file: IO[bytes]) -> Iterator[Row]:
        faults = Faults(Path(file.name))
        yield from iter_rows(faults.path, faults)
        faults.check()

    found = overlap(rows(train), rows(held_out) if held_out else (), labels)
    if found != Overlap(count, 0, 0):
        raise DataError(
            "the rows that were mixed are not what they should be; they have not been kept",
            where=f"{found}, {count} rows written",
            expected="every row, and nothing of the held-out rows among the rows to train on",
        )
    return found
