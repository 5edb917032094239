"""Files of a model folder: only regular ones inside it are opened, and JSON is parsed strictly and within bounds."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from mens_core.errors import ModelError

__all__ = ["LONGEST_JSON", "find_file", "parse_json", "read_json", "regular_size"]

# The limit safetensors' reference implementation sets for a header; real ones and indices stay below a tenth.
LONGEST_JSON = 100_000_000
# Each of these marks becomes a Python object of some hundred bytes; a header of 200 thousand tensors has as many.
_MOST_MARKS = 2_000_000
_DEEPEST = 64


def find_file(folder: Path, name: str) -> Path | None:
    """The path of a file in a model folder; None if the folder has nothing of that name.

    A link may stay in the folder, or lead from a snapshot of the Hugging Face cache to a blob of its repository.

    Raises:
        ModelError: if the name is a link that leads nowhere, in a circle or out of the folder.
    """
    path = folder / name
    if not os.path.lexists(path):
        return None
    try:
        home, real = folder.resolve(), path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "the link leads in a circle"
        raise ModelError(f"a file of the model cannot be reached: {reason}", where=path) from error
    if not real.is_relative_to(home) and not _is_blob_of(home, real):
        raise ModelError(
            "a link leads out of the model folder",
            where=f"{path} to {real}",
            expected="files in the folder itself, or a snapshot in the Hugging Face cache",
            fix="copy the file into the folder",
        )
    return path


def regular_size(path: Path) -> int:
    """The size of a regular file, in bytes; a pipe or a device, which could keep its reader waiting, is refused.

    Raises:
        ModelError: if there is no such file, or it is something else.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise ModelError(f"the file cannot be read: {error.strerror}", where=path) from error
    if not stat.S_ISREG(status.st_mode):
        raise ModelError("this is not a regular file", where=path)
    return status.st_size


def read_json(path: Path, *, expected: str) -> Any:
    """Parse one JSON file of a model folder.

    Raises:
        ModelError: if the file cannot be read or is not strict JSON, see ``parse_json``; the text in ``expected``
            then says what belongs there.
    """
    size = regular_size(path)
    if size > LONGEST_JSON:
        raise ModelError(f"{path.name} has {size} bytes, more than {LONGEST_JSON}", where=path, expected=expected)
    try:
        return parse_json(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path.name} cannot be read: {error.strerror}", where=path, expected=expected) from error
    except ValueError as error:
        raise ModelError(f"{path.name} cannot be read: {error}", where=path, expected=expected) from error


def parse_json(raw: bytes) -> Any:
    """Parse UTF-8 JSON.

    Raises:
        ValueError: if it is not UTF-8 or not JSON, nests without end, repeats a key in one object, or would unpack
            into more objects than any real file holds.
    """
    if sum(raw.count(mark) for mark in (b",", b"[", b"{")) > _MOST_MARKS:
        raise ValueError("it has too many parts")
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_repeats)
    except RecursionError:
        raise ValueError("it nests too deep") from None
    if _nests_too_deep(value):
        raise ValueError("it nests too deep")
    return value


def _is_blob_of(home: Path, real: Path) -> bool:
    """Whether ``real`` is where the Hugging Face cache keeps the files of the snapshot ``home``."""
    return home.parent.name == "snapshots" and real.parent == home.parent.parent / "blobs"


def _nests_too_deep(value: Any) -> bool:
    """Whether walking through the value by recursion, as many tools do, could fail although parsing did not."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(_DEEPEST):
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, dict | list)
        ]
        if not level:
            return False
    return True


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a key occurs twice")
    return entries
