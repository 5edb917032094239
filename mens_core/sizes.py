"""Numbers of bytes as people write and read them."""

from __future__ import annotations

import re

__all__ = ["read_size", "written_size"]

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*((?:[kmgt]i?)?b?)")
_UNITS = {"": 1, "b": 1} | {
    f"{letter}{binary}{end}": (1024 if binary else 1000) ** power
    for power, letter in enumerate("kmgt", start=1)
    for binary in ("", "i")
    for end in ("", "b")
}


def read_size(text: str) -> int:
    """Bytes of 6GiB, 800MB and the like.

    Raises:
        ValueError: if the text is no size.
    """
    found = _SIZE.fullmatch(text.strip().lower())
    if found is None:
        raise ValueError(f"{text!r} is not a size such as 6GiB, 800MB or a number of bytes")
    return int(float(found[1]) * _UNITS[found[2]])


def written_size(count: int) -> str:
    """The way ``read_size`` reads it."""
    return f"{count / 2**30:.2f}GiB" if count >= 2**30 else f"{count / 2**20:.0f}MiB"
