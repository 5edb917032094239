"""Files and folders that appear whole or not at all.

    temporary file beside the target ─▶ flush, fsync ─▶ rename over the target ─▶ fsync of the folder

A reader sees the old file or the new one; a crash, a full disk or an error in the middle leaves the old one.
"""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from mens_core.errors import ModelError

__all__ = ["appearing", "replacing"]

# What mkdir gives a folder; mkdtemp keeps others out.
_FOLDER_MODE = 0o755


@contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """Build a folder beside its place; it takes it when the block ends well, and leaves nothing behind otherwise.

    Args:
        folder: not there yet, or empty; its parents are made.

    Yields:
        The folder to build in.

    Raises:
        ModelError: if it is there and not empty, or no folder.
        OSError: as the file system reports it.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ModelError("the output folder is not empty", where=folder, fix="choose another --output")
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield building
        building.chmod(_FOLDER_MODE)
        building.replace(folder)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    _sync_folder(folder.parent)


@contextmanager
def replacing(*paths: Path, binary: bool = False) -> Iterator[tuple[IO[Any], ...]]:
    """Open one file per path, UTF-8 or binary; all take their places when the block ends well, or none does.

    They are renamed in the order given, so a file whose presence means "complete" is named last. Newlines are
    written as given. The folders must exist.

    Args:
        paths: the files to write or replace.
        binary: whether bytes are written instead of text.

    Yields:
        The open files, in the same order.

    Raises:
        OSError: if a file cannot be written; nothing at the targets has changed when writing was the cause.
    """
    temporaries = [path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp") for path in paths]
    try:
        with ExitStack() as stack:
            files = tuple(
                stack.enter_context(
                    temporary.open(
                        "xb" if binary else "x",
                        encoding=None if binary else "utf-8",
                        newline=None if binary else "\n",
                    )
                )
                for temporary in temporaries
            )
            yield files
            for file in files:
                file.flush()
                os.fsync(file.fileno())
        for temporary, path in zip(temporaries, paths, strict=True):
            temporary.replace(path)
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)
    for folder in {path.parent for path in paths}:
        _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    # Windows opens no folders; there the rename alone has to do.
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
