"""Text, JSON and hashes of whole files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from mens_core.atomic import replacing

__all__ = ["sha256_file", "write_json", "write_text"]


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


def sha256_file(path: Path) -> str:
    """Sha256 of a file as hexadecimal text, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
