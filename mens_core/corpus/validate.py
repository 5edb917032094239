"""Everything that is wrong with a file of rows, what training would not look at among it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mens_core.corpus.faults import Fault, Faults, kind_of
from mens_core.corpus.records import row_of_record
from mens_core.corpus.row import Row
from mens_core.corpus.rows import iter_rows

__all__ = ["find_faults"]

_WORDS = ("category", "lane", "task_family", "response_mode")
_NUMBERS = {"rating": 5, "difficulty": 10}


def find_faults(path: Path, record_format: str | None = None) -> Faults:
    """Read every line of a file and book all that cannot be used.

    Args:
        path: as for ``iter_rows``.
        record_format: one of ``RECORD_FORMATS``; None for rows.

    Raises:
        DataError: if the file is missing, is no file, is empty, or is packed and damaged.
    """
    faults = Faults(path)
    for _ in iter_rows(path, faults, partial(_checked, record_format)):
        pass
    return faults


def _checked(record_format: str | None, record: Mapping[str, Any], line: int) -> Row:
    row = row_of_record(record_format, record, line)
    for key in _WORDS:
        value = row.metadata.get(key)
        if value is not None and not isinstance(value, str):
            raise Fault(f"{key!r} is a JSON {kind_of(value)}", f"{key!r} as a text, or none")
    for key, most in _NUMBERS.items():
        value = row.metadata.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise Fault(f"{key!r} is a JSON {kind_of(value)}", f"a number from 1 to {most}, or none")
        if not 1 <= value <= most:
            raise Fault(f"{key!r} is out of range", f"a number from 1 to {most}; the first is {value:g}")
    return row
