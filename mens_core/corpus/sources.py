"""Source folders and files → texts or lines, each with the name it has in the rows; what is left out is booked."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import attrs

from mens_core.corpus.lines import LONGEST_LINE
from mens_core.corpus.pair import Ledger
from mens_core.errors import DataError

__all__ = [
    "EXCLUDED_FOLDERS",
    "MARKDOWN_ENDINGS",
    "PYTHON_ENDINGS",
    "ROWS_ENDINGS",
    "SourceFile",
    "find_sources",
    "read_lines",
    "read_source",
]

PYTHON_ENDINGS, MARKDOWN_ENDINGS = (".py",), (".md", ".markdown")
#: Of files of validated rows. A folder's are not read: most files of this form hold something else.
ROWS_ENDINGS = (".jsonl", ".jsonl.gz")
#: Folders left out unless the caller says otherwise, besides hidden ones and virtual environments.
EXCLUDED_FOLDERS = ("__pycache__", "node_modules", "site-packages")

_UNNAMED_ROWS = "file of rows in a folder, read only where it is named itself"
_IN_FOLDERS = (*PYTHON_ENDINGS, *MARKDOWN_ENDINGS)

# Beyond this a file is data in disguise, and its syntax tree would take gigabytes.
_LARGEST_FILE_BYTES = 4_000_000


@attrs.frozen
class SourceFile:
    """A file to read.

    Attributes:
        path: where it is.
        name: ``folder/inner/file.py``, from the name of the folder the caller gave; no machine path.
    """

    path: Path
    name: str

    def ends_with(self, endings: tuple[str, ...]) -> bool:
        """Whether it is a file of this kind, in capitals or not."""
        return self.path.name.lower().endswith(endings)


def find_sources(sources: Sequence[Path], excluded: Sequence[str], skipped: Ledger) -> list[SourceFile]:
    """All Python and Markdown files, and files of rows that are named; each once, sorted within its source.

    Args:
        sources: folders and files, at least one.
        excluded: names of folders that are not entered; hidden folders and virtual environments never are.
        skipped: where files and folders that are left out are booked.

    Raises:
        DataError: if a source is missing, or a file that was named is of none of these kinds.
    """
    if not sources:
        raise DataError("no source was named", expected="at least one folder or file")
    missing = [str(source) for source in sources if not source.exists()]
    if missing:
        raise DataError("a source does not exist", where=", ".join(missing), expected="folders or files that exist")
    found: dict[Path, SourceFile] = {}
    labels: set[str] = set()
    for source in sources:
        label = _label(source, labels)
        for path, name in [(source, label)] if source.is_file() else _walk(source, label, excluded, skipped):
            file = SourceFile(path, name)
            if path == source and not file.ends_with((*_IN_FOLDERS, *ROWS_ENDINGS)):
                raise _unknown_kind(source)
            if path != source and not file.ends_with(_IN_FOLDERS):
                skipped.add(_UNNAMED_ROWS if file.ends_with(ROWS_ENDINGS) else "neither Python nor Markdown", name)
            elif found.setdefault(path.resolve(), file).name != name:
                skipped.add("reached a second time, by another source or a link", name)
    return list(found.values())


def read_source(file: SourceFile, skipped: Ledger) -> str | None:
    """The text of a file with newlines as its only line ends, or None when it was booked as unreadable."""
    try:
        data = file.path.read_bytes()
        if len(data) > _LARGEST_FILE_BYTES:
            skipped.add(f"larger than {_LARGEST_FILE_BYTES:,} bytes", file.name)
            return None
        return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        skipped.add("not UTF-8", f"{file.name} (byte {error.start})")
    except OSError as error:
        skipped.add("cannot be read", f"{file.name} ({error.strerror})")
    return None


def read_lines(file: SourceFile, skipped: Ledger) -> Iterator[bytes]:
    """The lines of a file of rows, unpacked if it ends in ``.gz``; where it cannot be read on, that is booked."""
    number = 0
    try:
        with gzip.open(file.path) if file.ends_with((".gz",)) else file.path.open("rb") as lines:
            while line := lines.readline(LONGEST_LINE + 1):
                number += 1
                if len(line) > LONGEST_LINE:
                    skipped.add("cannot be read on", f"{file.name}, line {number}: more than {LONGEST_LINE:,} bytes")
                    return
                yield line
    except (OSError, EOFError, zlib.error) as error:
        skipped.add(
            "cannot be read on", f"{file.name}, after line {number} ({getattr(error, 'strerror', None) or error})"
        )


def _label(source: Path, taken: set[str]) -> str:
    """The name of a source, made unique; two folders called ``src`` become ``src`` and ``src-2``."""
    name = source.resolve().name or "root"
    number = 1
    while (label := name if number == 1 else f"{name}-{number}") in taken:
        number += 1
    taken.add(label)
    return label


def _walk(folder: Path, label: str, excluded: Sequence[str], skipped: Ledger) -> Iterator[tuple[Path, str]]:
    def unreadable(error: OSError) -> None:
        skipped.add("folder that cannot be read", f"{error.filename} ({error.strerror})")

    for root, folders, files in os.walk(folder, onerror=unreadable):
        inner = Path(root).relative_to(folder).as_posix()
        prefix = label if inner == "." else f"{label}/{inner}"
        entered = [name for name in sorted(folders) if not _left_out(Path(root) / name, excluded)]
        for name in sorted(set(folders) - set(entered)):
            skipped.add("folder left out", f"{prefix}/{name}")
        folders[:] = entered
        for name in sorted(files):
            yield Path(root) / name, f"{prefix}/{name}"


def _left_out(folder: Path, excluded: Sequence[str]) -> bool:
    return folder.name.startswith(".") or folder.name in excluded or (folder / "pyvenv.cfg").exists()


def _unknown_kind(source: Path) -> DataError:
    endings = ", ".join((*_IN_FOLDERS, *ROWS_ENDINGS))
    return DataError(
        "a source is neither Python nor Markdown nor a file of rows",
        where=source,
        expected=f"a folder, or a file in {endings}",
    )
