"""Source folders and files → texts, each with the name it has in the rows; what is left out is booked."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import attrs

from mens_core.corpus.pair import Ledger
from mens_core.errors import DataError

__all__ = [
    "EXCLUDED_FOLDERS",
    "MARKDOWN_ENDINGS",
    "PYTHON_ENDINGS",
    "SourceFile",
    "find_sources",
    "read_source",
]

PYTHON_ENDINGS, MARKDOWN_ENDINGS = (".py",), (".md", ".markdown")
#: Folders left out unless the caller says otherwise, besides hidden ones and virtual environments.
EXCLUDED_FOLDERS = ("__pycache__", "node_modules", "site-packages")

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


def find_sources(sources: Sequence[Path], excluded: Sequence[str], skipped: Ledger) -> list[SourceFile]:
    """All Python and Markdown files, each once, in the order of the sources and sorted within each.

    Args:
        sources: folders and files, at least one.
        excluded: names of folders that are not entered; hidden folders and virtual environments never are.
        skipped: where files and folders that are left out are booked.

    Raises:
        DataError: if a source is missing, or a file that was named is neither Python nor Markdown.
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
            if not path.name.lower().endswith((*PYTHON_ENDINGS, *MARKDOWN_ENDINGS)):
                if path == source:
                    raise _unknown_kind(source)
                skipped.add("neither Python nor Markdown", name)
            elif found.setdefault(path.resolve(), SourceFile(path, name)).name != name:
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
    endings = ", ".join((*PYTHON_ENDINGS, *MARKDOWN_ENDINGS))
    return DataError(
        "a source is neither Python nor Markdown", where=source, expected=f"a folder, or a file in {endings}"
    )
