"""Token rows on disk, under a name made of all that decides them: a file is tokenised once.

    $XDG_CACHE_HOME/mens-core/tokens/<sha256>/
        tokens.i4  mask.b1      as long as the file's tokens
        offsets.i8 …            a number a row each
        table.json              names, faults, sizes; written last

All columns are mapped: a page is read where it is looked at, and the system takes it back when it needs the memory.

A folder appears whole or not at all. Beyond ``LIMIT_BYTES`` those unused for longest make room.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import tokenizers

from mens_core.corpus.faults import Faults
from mens_core.corpus.row import Row
from mens_core.errors import DataError
from mens_core.text.encode import Encoder
from mens_core.text.table import COLUMNS, RowTable, Supervision, table_of, write_columns

__all__ = ["LIMIT_BYTES", "cached_table", "tokens_folder"]

#: Most that the cache keeps, in bytes: some four billion tokens.
LIMIT_BYTES = 20 << 30

# To be raised with every change of how rows are read, cut or laid out; chats carry versions of their own.
_FORMAT = "mens.tokens.v2"
_TABLE = "table.json"
_FILES = {name: f"{name}.{dtype.str[1:]}" for name, dtype in COLUMNS.items()}
_HALF_MADE, _SECONDS_TO_MAKE = ".tmp", 7 * 24 * 3600


def tokens_folder() -> Path:
    """Where token rows are kept: in ``$XDG_CACHE_HOME``, which is ``~/.cache`` where it is not set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mens-core" / "tokens"


def cached_table(
    path: Path,
    content: str,
    encoder: Encoder,
    supervision: Supervision,
    read: Callable[[Faults], Iterable[Row]],
) -> RowTable:
    """The rows of a file as tokens: those that are kept, or made and kept now.

    Args:
        path: of the file.
        content: its sha256.
        encoder: of the model.
        supervision: what is trained on.
        read: yields the rows and books those that cannot be used.

    Raises:
        DataError: if the rows cannot be read, or the cache cannot be written.
    """
    decided = (_FORMAT, tokenizers.__version__, content, encoder.digest, *map(str, attrs.astuple(supervision)))
    folder = tokens_folder() / hashlib.sha256("\0".join(decided).encode()).hexdigest()
    found = _open(folder, path)
    if found is not None:
        return found
    faults = Faults(path)
    try:
        _write(folder, _read(path, read(faults)), encoder, supervision, faults)
    except OSError as error:
        raise DataError(
            f"token rows cannot be kept: {error.strerror}",
            where=folder.parent,
            fix="make room there, or set XDG_CACHE_HOME to a folder that can be written",
        ) from error
    written = _open(folder, path)
    assert written is not None, "it has just been written"
    return written


def _read(path: Path, rows: Iterable[Row]) -> Iterator[Row]:
    """The rows; a disk that fails under them is told apart from one that fails under the cache."""
    try:
        yield from rows
    except OSError as error:
        raise DataError(f"the file of rows cannot be read: {error.strerror}", where=path) from error


def _write(folder: Path, rows: Iterable[Row], encoder: Encoder, supervision: Supervision, faults: Faults) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}{_HALF_MADE}")
    temporary.mkdir()
    try:
        with ExitStack() as opened:
            files = {name: opened.enter_context((temporary / _FILES[name]).open("xb")) for name in COLUMNS}
            sources, contexts = write_columns(rows, encoder, supervision, faults, files)
            counts = {name: file.tell() // COLUMNS[name].itemsize for name, file in files.items()}
            for file in files.values():
                file.flush()
                os.fsync(file.fileno())
        described = {
            "format": _FORMAT,
            "counts": counts,
            "sources": sources,
            "contexts": contexts,
            "faults": faults.as_dict(),
        }
        (temporary / _TABLE).write_text(json.dumps(described), encoding="utf-8")
        _make_room(folder.parent, sum(file.stat().st_size for file in temporary.iterdir()))
        try:
            temporary.rename(folder)
        except OSError:
            # Another run has made the same rows in the meantime; what cannot be opened makes way.
            if _open(folder, faults.path) is None:
                shutil.rmtree(folder, ignore_errors=True)
                temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _open(folder: Path, path: Path) -> RowTable | None:
    """The rows of a folder; None if it is not there, or damaged."""
    try:
        described: dict[str, Any] = json.loads((folder / _TABLE).read_text(encoding="utf-8"))
        columns = {name: _mapped(folder / _FILES[name], name, described["counts"][name]) for name in COLUMNS}
        if columns["offsets"][-1] != len(columns["tokens"]):
            return None
        os.utime(folder / _TABLE)
    except (OSError, ValueError, KeyError):
        return None
    return table_of(columns, described["sources"], described["contexts"], Faults.from_dict(path, described["faults"]))


def _mapped(file: Path, name: str, count: int) -> Any:
    """A column.

    Raises:
        ValueError: if the file has another size.
    """
    dtype = COLUMNS[name]
    if file.stat().st_size != count * dtype.itemsize:
        raise ValueError(f"{file} has {file.stat().st_size} bytes, {count} numbers expected")
    # An empty file cannot be mapped.
    # As an array of the plain kind: every view of a memmap costs a microsecond of its own.
    return np.asarray(np.memmap(file, dtype, "r", shape=(count,))) if count else np.empty(0, dtype)


def _make_room(folder: Path, needed: int) -> None:
    """Remove what runs that died left half made, and those unused for longest until what is coming finds room."""
    entries = list(folder.iterdir())
    for entry in entries:
        if entry.suffix == _HALF_MADE and entry.stat().st_mtime < time.time() - _SECONDS_TO_MAKE:
            shutil.rmtree(entry, ignore_errors=True)
    kept = [entry for entry in entries if (entry / _TABLE).is_file() and entry.suffix != _HALF_MADE]
    sizes = {entry: sum(file.stat().st_size for file in entry.iterdir()) for entry in kept}
    total = needed + sum(sizes.values())
    for entry in sorted(kept, key=lambda entry: (entry / _TABLE).stat().st_mtime):
        if total <= LIMIT_BYTES:
            return
        shutil.rmtree(entry, ignore_errors=True)
        total -= sizes[entry]
