"""Source trees → ``train.jsonl``, ``eval.jsonl`` and ``metadata.json``.

    *.py ─▶ python_pairs ───────┐
    *.md ─▶ markdown_pairs ─────┼▶ length ─▶ duplicates ─▶ spool on disk ─▶ split by content ─▶ two files
    *.jsonl ─▶ validated_pairs ─┘

The same sources and settings give the same bytes. Rows keep the order of the sources, unless they are ordered by
difficulty; they wait in a temporary file, so memory grows by one to two kilobytes a row. Whatever is left out is
counted, with examples.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import IO

import attrs

from mens_core.atomic import replacing
from mens_core.corpus.collector import Collector
from mens_core.corpus.near_duplicates import NearDuplicates
from mens_core.corpus.pairs_defaults import EVAL_FRACTION, MAX_CHARS, MIN_CHARS, MULTI_TURN, NEGATIVES, SIMILARITY
from mens_core.corpus.pairs_report import PARTS, PairsReport, tally_lines
from mens_core.corpus.python_pairs import Shares
from mens_core.corpus.sources import EXCLUDED_FOLDERS, find_sources
from mens_core.errors import DataError

__all__ = ["PairsReport", "write_pairs"]


@attrs.frozen(kw_only=True)
class _Settings:
    """The arguments of ``write_pairs`` that decide what is written; ``metadata.json`` lists them."""

    eval_fraction: float
    seed: int
    min_chars: int
    max_chars: int
    negatives: float
    multi_turn: float
    near_duplicates: float
    curriculum: bool
    exclude: Sequence[str]

    def check(self) -> None:
        """Raise a ``DataError`` that names every setting out of range."""
        fits = {
            "eval_fraction": (0 <= self.eval_fraction < 1, "from 0 to less than 1"),
            "min_chars": (self.min_chars >= 1, "1 or more"),
            "max_chars": (self.max_chars > self.min_chars, f"more than min_chars, {self.min_chars}"),
            "negatives": (0 <= self.negatives <= 1, "from 0 to 1"),
            "multi_turn": (0 <= self.multi_turn <= 1, "from 0 to 1"),
            "near_duplicates": (0.5 <= self.near_duplicates <= 1, "from 0.5 to 1"),
        }
        problems = [f"{name} = {getattr(self, name)} ({fit})" for name, (good, fit) in fits.items() if not good]
        problems += [
            f"exclude = {name!r} (a folder's name, not a path)" for name in self.exclude if not name or "/" in name
        ]
        if problems:
            raise DataError("settings of the corpus are out of range", where=", ".join(problems))


def write_pairs(
    sources: Sequence[str | Path],
    output: str | Path,
    *,
    eval_fraction: float = EVAL_FRACTION,
    seed: int = 0,
    min_chars: int = MIN_CHARS,
    max_chars: int = MAX_CHARS,
    negatives: float = NEGATIVES,
    multi_turn: float = MULTI_TURN,
    near_duplicates: float = SIMILARITY,
    curriculum: bool = False,
    exclude: Sequence[str] = EXCLUDED_FOLDERS,
    overwrite: bool = False,
) -> PairsReport:
    """Make a corpus of prompt and response rows from Python, Markdown and validated rows.

    Rows of one function, or of one section of a document, fall in the same part, and so do rows that share a
    prompt or a response; ``eval.jsonl`` therefore asks nothing that ``train.jsonl`` answers.

    Args:
        sources: folders and files, at least one.
        output: folder for the three files; made when it does not exist.
        eval_fraction: share of the groups held out, from 0 (no ``eval.jsonl``) to less than 1.
        seed: another seed holds out another part, and breaks other functions elsewhere.
        min_chars: rows with a shorter response are left out, in characters.
        max_chars: longer rows are left out, in characters of prompts and responses together.
        negatives: share of the functions that are also shown with a defect, to be corrected, from 0 to 1.
        multi_turn: share of the functions that are also talked about in two exchanges, from 0 to 1.
        near_duplicates: similarity from which a function or block is left out for an earlier one, as the share
            of common runs of five tokens, from 0.5 to 1, which only takes what has the same tokens.
        curriculum: whether the rows are ordered from easy to difficult. Training draws them in its own order.
        exclude: names of folders that are not entered, besides hidden ones.
        overwrite: whether files of an earlier corpus in ``output`` are replaced.

    Returns:
        The counts of what was written and left out.

    Raises:
        DataError: if a setting is out of range, a source is missing, no row comes out, or ``output`` holds a
            corpus already. Nothing has been written then.
        OSError: if the disk refuses; an earlier corpus is then still in place.
    """
    settings = _Settings(
        eval_fraction=eval_fraction,
        seed=seed,
        min_chars=min_chars,
        max_chars=max_chars,
        negatives=negatives,
        multi_turn=multi_turn,
        near_duplicates=near_duplicates,
        curriculum=curriculum,
        exclude=list(exclude),
    )
    settings.check()
    folder, paths = Path(output), [Path(source) for source in sources]
    _check_output(folder, overwrite=overwrite)
    with tempfile.TemporaryFile() as spool, tempfile.TemporaryFile() as texts:
        collector = Collector(
            spool,
            NearDuplicates(texts, near_duplicates),
            Shares(negatives=negatives, multi_turn=multi_turn, seed=seed, max_chars=max_chars),
            min_chars=min_chars,
        )
        for file in find_sources(paths, exclude, collector.skipped):
            collector.read(file)
        if not collector.categories:
            raise _no_rows(paths, collector)
        held_out = collector.groups.held_out(eval_fraction, seed)
        report = _report(folder, collector, held_out)
        _write(report, settings, spool, held_out, collector.difficulties if curriculum else None)
    return report


def _report(output: Path, collector: Collector, held_out: Sequence[bool]) -> PairsReport:
    by_category = {category: dict.fromkeys(PARTS, 0) for category in sorted(set(collector.categories))}
    for category, out in zip(collector.categories, held_out, strict=True):
        by_category[category][PARTS[out]] += 1
    return PairsReport(
        output=output,
        rows={part: held_out.count(part == "eval") for part in PARTS},
        rows_by_category=by_category,
        rows_by_difficulty=dict(sorted(Counter(collector.difficulties).items())),
        files_read=collector.files_read,
        files_skipped=collector.skipped.tallies(),
        duplicates_dropped=collector.duplicates.tallies(),
        rows_dropped=collector.dropped.tallies(),
    )


def _write(
    report: PairsReport,
    settings: _Settings,
    spool: IO[bytes],
    held_out: Sequence[bool],
    difficulties: Sequence[int] | None,
) -> None:
    report.output.mkdir(parents=True, exist_ok=True)
    # train.jsonl takes its place last: where it stands, the corpus is whole.
    parts = ["eval", "train"] if report.rows["eval"] else ["train"]
    paths = [report.output / "metadata.json", *(report.output / f"{part}.jsonl" for part in parts)]
    hashes = {part: hashlib.sha256() for part in parts}
    with replacing(*paths) as (metadata, *files):
        by_part = dict(zip(parts, files, strict=True))
        for row, line in _lines(spool, difficulties):
            part = PARTS[held_out[row]]
            by_part[part].write(line.decode())
            hashes[part].update(line)
        sha256 = {f"{part}.jsonl": digest.hexdigest() for part, digest in sorted(hashes.items())}
        json.dump(report.metadata(attrs.asdict(settings), sha256), metadata, indent=2, ensure_ascii=False)
        metadata.write("\n")
        if "eval" not in parts:
            # An earlier corpus's held-out rows are no longer held out.
            (report.output / "eval.jsonl").unlink(missing_ok=True)


def _lines(spool: IO[bytes], difficulties: Sequence[int] | None) -> Iterator[tuple[int, bytes]]:
    """(row, line) in the order of the spool, or from easy to difficult, rows of one difficulty in their order."""
    spool.seek(0)
    if difficulties is None:
        yield from enumerate(spool)
        return
    starts = [0, *accumulate(map(len, spool))]
    for row in sorted(range(len(difficulties)), key=difficulties.__getitem__):
        spool.seek(starts[row])
        yield row, spool.readline()


def _check_output(output: Path, *, overwrite: bool) -> None:
    if output.exists() and not output.is_dir():
        raise DataError("the output is a file", where=output, expected="a folder, or a path that is free")
    present = [name for name in ("train.jsonl", "eval.jsonl", "metadata.json") if (output / name).exists()]
    if present and not overwrite:
        raise DataError(
            "the output folder holds a corpus already",
            where=f"{output}: {', '.join(present)}",
            expected="a folder without these files",
            fix="choose another --output, or pass --overwrite to replace them",
        )


def _no_rows(sources: Sequence[Path], collector: Collector) -> DataError:
    found = [*tally_lines(collector.dropped.tallies()), *tally_lines(collector.skipped.tallies())]
    return DataError(
        "\n".join(["no row came out of the sources; nothing has been written", *found]),
        where=", ".join(map(str, sources)),
        expected="Python files with functions, Markdown files with fenced code blocks, or validated rows",
        fix="name other sources, or widen --min-chars and --max-chars",
    )
