"""Text, JSON and hashes of whole files."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from mens_core.atomic import replacing

__all__ = ["copy_bytes", "sha256_file", "write_json", "write_text"]

_PIECE = 1 << 23
_CANNOT = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})


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

    Holes of the source, which take no room on the disk and read as zeros, become holes of the target.

    Raises:
        OSError: as the file system reports it, or if the source ends before.
    """
    # Unbuffered, since looking for holes moves the place, too.
    with source.open("rb", buffering=0) as file:
        if os.fstat(file.fileno()).st_size < stop:
            raise _ended(source)
        target.flush()
        offset = target.seek(0, os.SEEK_END) - start
        for first, last in _extents(file, start, stop):
            target.seek(offset + first)
            _copy_extent(source, file, first, last, target)
        # A hole at the end is made by the length alone.
        target.truncate(offset + stop)
        target.seek(0, os.SEEK_END)


def _extents(file: IO[bytes], start: int, stop: int) -> Iterator[tuple[int, int]]:
    """The parts of [start, stop) that hold data; all of it where the system or the file system cannot tell."""
    while start < stop and hasattr(os, "SEEK_DATA"):
        try:
            first = os.lseek(file.fileno(), start, os.SEEK_DATA)
            last = os.lseek(file.fileno(), first, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:
                # From here on there are holes alone.
                return
            if error.errno not in _CANNOT:
                raise
            break
        if first >= stop:
            return
        yield first, min(last, stop)
        start = last
    if start < stop:
        yield start, stop


def _copy_extent(source: Path, file: IO[bytes], start: int, stop: int, target: IO[bytes]) -> None:
    """Copy to where the target stands."""
    while start < stop and hasattr(os, "copy_file_range"):
        try:
            copied = os.copy_file_range(file.fileno(), target.fileno(), stop - start, start)
        except OSError as error:
            # The two lie on file systems, or in a kernel, that cannot do it among themselves.
            if error.errno not in {errno.EXDEV, *_CANNOT}:
                raise
            break
        if not copied:
            break
        start += copied
    # The kernel moved the place behind the buffer's back.
    target.seek(os.lseek(target.fileno(), 0, os.SEEK_CUR))
    file.seek(start)
    while start < stop:
        piece = file.read(min(stop - start, _PIECE))
        if not piece:
            raise _ended(source)
        target.write(piece)
        start += len(piece)
    target.flush()


def _ended(source: Path) -> OSError:
    return OSError(errno.EIO, "the file ended while it was copied", str(source))


def sha256_file(path: Path) -> str:
    """Sha256 of a file as hexadecimal text, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
