"""Token rows on disk, under a name made of all that decides them: a file is tokenised once.

    $XDG_CACHE_HOME/mens-core/tokens/<sha256>/
        tokens.i32  mask.u8     as long as the file's tokens; mapped, read where rows are looked at
        index.npz               a few numbers a row
        table.json              names, faults, sizes; written last

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
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import tokenizers

from mens_core.corpus.faults import Faults
from mens_core.corpus.row import Row
from mens_core.errors import DataError
from mens_core.text.encode import Encoder
from mens_core.text.table import Columns, RowTable, Supervision, write_tokens
from mens_core.text.tokens import TokenRows

__all__ = ["LIMIT_BYTES", "cached_table", "tokens_folder"]

#: Most that the cache keeps, in bytes: some four billion tokens.
LIMIT_BYTES = 20 << 30

# To be raised with every change of how rows are read, cut or laid out; chats carry versions of their own.
_FORMAT = "mens.tokens.v1"
_IDS, _MASK, _INDEX, _TABLE = "tokens.i32", "mask.u8", "index.npz", "table.json"
_HALF_MADE, _SECONDS_TO_MAKE = ".tmp", 7 * 24 * 3600
_ARRAYS = ("lines", "source", "ratings", "context")


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
        with (temporary / _IDS).open("xb") as ids, (temporary / _MASK).open("xb") as mask:
            lengths, trained, columns = write_tokens(rows, encoder, supervision, faults, ids, mask)
            for file in (ids, mask):
                file.flush()
                os.fsync(file.fileno())
        arrays = {name: getattr(columns, name) for name in _ARRAYS}
        with (temporary / _INDEX).open("xb") as file:
            np.savez(file, lengths=lengths, trained=trained, **arrays)
        described = {
            "format": _FORMAT,
            "tokens": int(lengths.sum()),
            "sources": list(columns.sources),
            "contexts": list(columns.contexts),
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
        with np.load(folder / _INDEX) as index:
            arrays = {name: index[name] for name in ("lengths", "trained", *_ARRAYS)}
        tokens = described["tokens"]
        if tokens != int(arrays["lengths"].sum()) or (folder / _IDS).stat().st_size != 4 * tokens:
            return None
        ids, mask = _mapped(folder / _IDS, np.int32, tokens), _mapped(folder / _MASK, np.bool_, tokens)
        os.utime(folder / _TABLE)
    except (OSError, ValueError, KeyError):
        return None
    columns = Columns(
        sources=described["sources"],
        contexts=described["contexts"],
        **{name: arrays[name] for name in _ARRAYS},
    )
    rows = TokenRows.laid_out(ids, mask, arrays["lengths"], arrays["trained"])
    return RowTable(rows, columns, Faults.from_dict(path, described["faults"]))


def _mapped(file: Path, dtype: Any, count: int) -> Any:
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
