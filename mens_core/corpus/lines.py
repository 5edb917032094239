"""The lines of a file, as it stands or packed by gzip or Zstandard, one after the other.

What a file is packed with is told by its first bytes, not by its name. Memory holds one line and one piece of the
file, whatever the file's size.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Protocol

from mens_core.errors import DataError

__all__ = ["LONGEST_LINE", "read_lines"]

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
# A packed piece grows by at most a factor of 1,000 in gzip; in Zstandard, 4 bytes can stand for 128 KiB.
_PIECE = 1 << 12
# The longest row there is reason to read has a tenth of this: four million tokens.
LONGEST_LINE = 1 << 24


def read_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file; a byte-order mark and line feeds are not part of them.

    Args:
        path: plain, gzip (RFC 1952) or Zstandard (RFC 8878); more than one packed stream may follow each other.

    Raises:
        DataError: if there is no such file, a packed stream is cut short or damaged, or a line is longer than any
            row; the message says how many whole lines came before.
    """
    if not path.is_file():
        raise DataError(
            "the file of rows is a folder" if path.is_dir() else "the file of rows does not exist",
            where=path,
            expected="a file with one JSON object a line",
            fix="write one with: python -m mens_core corpus pairs SOURCES --output DIR",
        )
    count = 0
    with path.open("rb") as file:
        try:
            for line in _lines(file):
                yield line if count else line.removeprefix(_BYTE_ORDER_MARK)
                count += 1
        except _DamagedError as damage:
            raise DataError(
                str(damage), where=f"{path}, after line {count}", fix="copy or pack the file again"
            ) from damage


class _DamagedError(Exception):
    """A packed stream that does not come to its end, or a line that does not."""


_TOO_LONG = f"the file of rows has a line of more than {LONGEST_LINE:,} bytes"


class _Stream(Protocol):
    """One packed stream; both libraries' objects look like this."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, /) -> bytes: ...


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    start = file.read(len(_ZSTD))
    file.seek(0)
    if start.startswith(_GZIP):
        yield from _split(_unpacked(file, lambda: zlib.decompressobj(wbits=31), zlib.error))
    elif start == _ZSTD:
        # heavy for those who have no packed files
        import zstandard  # noqa: PLC0415

        unpacker = zstandard.ZstdDecompressor()
        yield from _split(_unpacked(file, unpacker.decompressobj, zstandard.ZstdError))
    else:
        while line := file.readline(LONGEST_LINE + 1):
            if len(line) > LONGEST_LINE:
                raise _DamagedError(_TOO_LONG)
            yield line.removesuffix(b"\n")


def _unpacked(file: IO[bytes], begin: Callable[[], _Stream], error: type[Exception]) -> Iterator[bytes]:
    """The packed streams that follow each other in a file, piece by piece."""
    stream, begun = begin(), False
    while packed := file.read(_PIECE):
        while packed:
            try:
                yield stream.decompress(packed)
            except error as problem:
                raise _DamagedError(f"the packed file is damaged: {problem}") from problem
            packed = stream.unused_data if stream.eof else b""
            begun = not stream.eof
            if stream.eof:
                stream = begin()
    if begun:
        raise _DamagedError("the packed file ends in the middle of its packed stream")


def _split(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Pieces of text → lines; the last may lack its line feed."""
    begun: list[bytes] = []
    length = 0
    for piece in pieces:
        end, feed, rest = piece.partition(b"\n")
        begun.append(end)
        length = 0 if feed else length + len(end)
        if length > LONGEST_LINE:
            raise _DamagedError(_TOO_LONG)
        if feed:
            yield b"".join(begun)
            *whole, last = rest.split(b"\n")
            yield from whole
            begun = [last]
    if last := b"".join(begun):
        yield last
