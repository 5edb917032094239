"""Text, JSON and hashes of whole files."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import IO, Any

from mens_core.atomic import replacing

__all__ = ["copy_bytes", "sha256_file", "write_json", "write_text"]

_PIECE = 1 << 23


def write_text(path: Path, text: str) -> None:
    """Replace a text file atomically; after a crash it holds the old text or the new, never a part.

    Raises:
        OSError: as the file system reports it; the old file is then untouched.
    """
    with replacing(path) as (file,):
        file.write(text)


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file atomically; keys keep their order, NaN is refused."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def copy_bytes(source: Path, start: int, stop: int, target: IO[bytes]) -> None:
    """Append bytes [start, stop) of a file to another; within one file system they never leave the kernel.

    Raises:
        OSError: as the file system reports it, or if the source ends before.
    """
    with source.open("rb") as file:
        target.flush()
        while start < stop and hasattr(os, "copy_file_range"):
            try:
                copied = os.copy_file_range(file.fileno(), target.fileno(), stop - start, start)
            except OSError as error:
                # The two lie on file systems, or in a kernel, that cannot do it among themselves.
                if error.errno not in {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}:
                    raise
                break
            if not copied:
                break
            start += copied
        target.seek(0, os.SEEK_END)
        file.seek(start)
        while start < stop:
            piece = file.read(min(stop - start, _PIECE))
            if not piece:
                raise OSError(errno.EIO, "the file ended while it was copied", str(source))
            target.write(piece)
            start += len(piece)


def sha256_file(path: Path) -> str:
    """Sha256 of a file as hexadecimal text, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
