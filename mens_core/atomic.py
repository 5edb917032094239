"""Files that appear whole or not at all.

    temporary file beside the target ─▶ flush, fsync ─▶ rename over the target ─▶ fsync of the folder

A reader sees the old file or the new one; a crash, a full disk or an error in the middle leaves the old one.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

__all__ = ["replacing"]


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
