"""Source trees → ``train.jsonl``, ``eval.jsonl`` and ``metadata.json``.

    *.py ─▶ python_pairs ───┐
    *.md ─▶ markdown_pairs ─┴▶ length ─▶ duplicates ─▶ spool on disk ─▶ split by content ─▶ two files

The same sources and settings give the same bytes. Rows keep the order of the sources; they wait in a
temporary file, so memory grows by a few hundred bytes a row. Whatever is left out is counted, with examples.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import attrs

from mens_core.atomic import replacing
from mens_core.corpus.markdown_pairs import markdown_pairs
from mens_core.corpus.pair import Ledger, Pair, Tally
from mens_core.corpus.python_pairs import python_pairs
from mens_core.corpus.sources import EXCLUDED_FOLDERS, PYTHON_ENDINGS, SourceFile, find_sources, read_source
from mens_core.corpus.split import Groups, fingerprint
from mens_core.errors import DataError

__all__ = ["EVAL_FRACTION", "MAX_CHARS", "MIN_CHARS", "PairsReport", "write_pairs"]

SCHEMA_VERSION = "mens.corpus.pairs.v1"
EVAL_FRACTION = 0.05
#: Characters of a response below which there is nothing to learn from it.
MIN_CHARS = 20
#: Characters of prompt and response together. With its tags such a row fits the 1024 positions of the lab base,
#: which reads bytes; in a vocabulary made for code it has some 300 tokens.
MAX_CHARS = 900

_PARTS = ("train", "eval")


@attrs.frozen(kw_only=True)
class PairsReport:
    """What was written and what was not.

    Attributes:
        output: the folder.
        rows: number of rows by part, ``train`` and ``eval``.
        rows_by_category: the same for each category.
        files_read: files that were read and parsed.
        files_skipped: files and folders left out, by reason.
        duplicates_dropped: rows equal to an earlier one in prompt and response.
        rows_dropped: rows left out, by reason; duplicates are not among them.
    """

    output: Path
    rows: Mapping[str, int]
    rows_by_category: Mapping[str, Mapping[str, int]]
    files_read: int
    files_skipped: Mapping[str, Tally]
    duplicates_dropped: int
    rows_dropped: Mapping[str, Tally]

    def text(self) -> str:
        """The report as lines for a reader."""
        train, held_out = (self.rows[part] for part in _PARTS)
        rows = f"{train:,} rows to train on, {held_out:,} held out"
        lines = [f"{self.output}: {rows}; {self.files_read:,} files read"]
        lines += [f"{sum(parts.values()):>10,}  {name}" for name, parts in self.rows_by_category.items()]
        duplicates = [f"{self.duplicates_dropped:>10,}  equal to an earlier row"] if self.duplicates_dropped else []
        dropped, files = [*duplicates, *_tally_lines(self.rows_dropped)], _tally_lines(self.files_skipped)
        lines += ["rows left out:", *dropped] if dropped else []
        lines += ["files and folders left out:", *files] if files else []
        return "\n".join(lines)


def _tally_lines(tallies: Mapping[str, Tally]) -> list[str]:
    return [f"{tally.count:>10,}  {reason} (first: {tally.examples[0]})" for reason, tally in tallies.items()]


def write_pairs(
    sources: Sequence[Path],
    output: Path,
    *,
    eval_fraction: float = EVAL_FRACTION,
    seed: int = 0,
    min_chars: int = MIN_CHARS,
    max_chars: int = MAX_CHARS,
    exclude: Sequence[str] = EXCLUDED_FOLDERS,
    overwrite: bool = False,
) -> PairsReport:
    """Make a corpus of prompt and response rows from Python and Markdown sources.

    Rows of one function, or of one section of a document, fall in the same part, and so do rows that share a
    prompt or a response; ``eval.jsonl`` therefore asks nothing that ``train.jsonl`` answers.

    Args:
        sources: folders and files, at least one.
        output: folder for the three files; made when it does not exist.
        eval_fraction: share of the groups held out, from 0 (no ``eval.jsonl``) to less than 1.
        seed: another seed holds out another part.
        min_chars: shorter responses are left out, in characters.
        max_chars: longer rows are left out, in characters of prompt and response together.
        exclude: names of folders that are not entered, besides hidden ones.
        overwrite: whether files of an earlier corpus in ``output`` are replaced.

    Returns:
        The counts of what was written and left out.

    Raises:
        DataError: if a setting is out of range, a source is missing, no row comes out, or ``output`` holds a
            corpus already. Nothing has been written then.
        OSError: if the disk refuses; an earlier corpus is then still in place.
    """
    _check_settings(eval_fraction, min_chars, max_chars, exclude)
    _check_output(output, overwrite=overwrite)
    skipped = Ledger()
    files = find_sources(sources, exclude, skipped)
    with tempfile.TemporaryFile() as spool:
        collector = _Collector(spool, min_chars, max_chars)
        files_read = sum(collector.read(file, skipped) for file in files)
        if not collector.categories:
            raise _no_rows(sources, skipped, collector)
        held_out = collector.groups.held_out(eval_fraction, seed)
        report = PairsReport(
            output=output,
            rows={part: held_out.count(part == "eval") for part in _PARTS},
            rows_by_category=_by_category(collector.categories, held_out),
            files_read=files_read,
            files_skipped=skipped.tallies(),
            duplicates_dropped=collector.duplicates,
            rows_dropped=collector.dropped.tallies(),
        )
        settings = {
            "eval_fraction": eval_fraction,
            "seed": seed,
            "min_chars": min_chars,
            "max_chars": max_chars,
        }
        _write(report, {**settings, "exclude": list(exclude)}, spool, held_out)
    return report


class _Collector:
    """Takes pairs in, spools the good ones as lines and remembers what the split needs."""

    def __init__(self, spool: IO[bytes], min_chars: int, max_chars: int) -> None:
        self._spool, self._min_chars, self._max_chars = spool, min_chars, max_chars
        self._seen: set[bytes] = set()
        self.groups, self.dropped = Groups(), Ledger()
        self.categories: list[str] = []
        self.duplicates = 0

    def read(self, file: SourceFile, skipped: Ledger) -> bool:
        """Take in all pairs of a file; False when it was booked as unusable."""
        text = read_source(file, skipped)
        if text is None:
            return False
        try:
            for pair in _pairs_of(file, text, self.dropped):
                self._take(pair)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            line = f":{error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
            reason = "not Python of this version" if line else f"not parsable ({type(error).__name__})"
            skipped.add(reason, f"{file.name}{line}")
            return False
        return True

    def _take(self, pair: Pair) -> None:
        reason = self._why_not(pair)
        if reason is not None:
            self.dropped.add(reason, pair.source)
            return
        content = hashlib.blake2b(f"{pair.prompt}\0{pair.response}".encode(), digest_size=16).digest()
        if content in self._seen:
            self.duplicates += 1
            return
        self._seen.add(content)
        self.groups.add([fingerprint(pair.origin), fingerprint(pair.prompt), fingerprint(pair.response)])
        self.categories.append(pair.category)
        self._spool.write(json.dumps(pair.record(), ensure_ascii=False).encode() + b"\n")

    def _why_not(self, pair: Pair) -> str | None:
        if len(pair.response.strip()) < self._min_chars:
            return f"response shorter than {self._min_chars} characters"
        if len(pair.prompt) + len(pair.response) > self._max_chars:
            return f"row longer than {self._max_chars} characters"
        # A docstring may spell half a surrogate pair as an escape, which no file in UTF-8 can hold.
        return None if _is_unicode(pair.prompt + pair.response) else "text that UTF-8 cannot write"


def _pairs_of(file: SourceFile, text: str, dropped: Ledger) -> Iterator[Pair]:
    if not file.path.name.lower().endswith(PYTHON_ENDINGS):
        yield from markdown_pairs(text, file.name, dropped)
        return
    with warnings.catch_warnings():
        # What the parser thinks of other people's escape sequences is not for this report.
        warnings.simplefilter("ignore")
        pairs = list(python_pairs(text, file.name, dropped))
    yield from pairs


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _by_category(categories: Sequence[str], held_out: Sequence[bool]) -> dict[str, dict[str, int]]:
    counts = {category: dict.fromkeys(_PARTS, 0) for category in sorted(set(categories))}
    for category, out in zip(categories, held_out, strict=True):
        counts[category][_PARTS[out]] += 1
    return counts


def _write(report: PairsReport, settings: Mapping[str, Any], spool: IO[bytes], held_out: Sequence[bool]) -> None:
    report.output.mkdir(parents=True, exist_ok=True)
    # train.jsonl takes its place last: where it stands, the corpus is whole.
    parts = ["eval", "train"] if report.rows["eval"] else ["train"]
    paths = [report.output / "metadata.json", *(report.output / f"{part}.jsonl" for part in parts)]
    hashes = {part: hashlib.sha256() for part in parts}
    with replacing(*paths) as (metadata, *files):
        by_part = dict(zip(parts, files, strict=True))
        spool.seek(0)
        for line, out in zip(spool, held_out, strict=True):
            by_part[_PARTS[out]].write(line.decode())
            hashes[_PARTS[out]].update(line)
        sha256 = {f"{part}.jsonl": digest.hexdigest() for part, digest in sorted(hashes.items())}
        json.dump(_metadata(report, settings, sha256), metadata, indent=2, ensure_ascii=False)
        metadata.write("\n")
        if "eval" not in parts:
            # An earlier corpus's held-out rows are no longer held out.
            (report.output / "eval.jsonl").unlink(missing_ok=True)


def _metadata(report: PairsReport, settings: Mapping[str, Any], sha256: Mapping[str, str]) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "generated_by": "mens_core corpus pairs",
        "total_pairs": sum(report.rows.values()),
        "rows": dict(report.rows),
        "rows_by_category": report.rows_by_category,
        "duplicates_dropped": report.duplicates_dropped,
        "rows_dropped": {reason: attrs.asdict(tally) for reason, tally in report.rows_dropped.items()},
        "files_read": report.files_read,
        "files_skipped": {reason: attrs.asdict(tally) for reason, tally in report.files_skipped.items()},
        "settings": dict(settings),
        "sha256": dict(sha256),
    }


def _check_settings(eval_fraction: float, min_chars: int, max_chars: int, exclude: Sequence[str]) -> None:
    problems = [] if 0 <= eval_fraction < 1 else [f"eval_fraction = {eval_fraction} (from 0 to less than 1)"]
    problems += [] if min_chars >= 1 else [f"min_chars = {min_chars} (1 or more)"]
    problems += [] if max_chars > min_chars else [f"max_chars = {max_chars} (more than min_chars, {min_chars})"]
    problems += [f"exclude = {name!r} (a folder's name, not a path)" for name in exclude if not name or "/" in name]
    if problems:
        raise DataError("settings of the corpus are out of range", where=", ".join(problems))


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


def _no_rows(sources: Sequence[Path], skipped: Ledger, collector: _Collector) -> DataError:
    found = [*_tally_lines(collector.dropped.tallies()), *_tally_lines(skipped.tallies())]
    return DataError(
        "\n".join(["no row came out of the sources; nothing has been written", *found]),
        where=", ".join(map(str, sources)),
        expected="Python files with functions, or Markdown files with fenced code blocks",
        fix="name other sources, or widen --min-chars and --max-chars",
    )
