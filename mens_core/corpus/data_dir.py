"""Which files of a data folder hold the rows."""

from __future__ import annotations

import difflib
from pathlib import Path

import attrs

from mens_core.errors import DataError
from mens_core.strict_yaml import read_mapping

__all__ = ["DataFiles", "find_data"]

_CONTRACT = "training_contract.yaml"
_NAMED = {"train_path": "the rows to train on", "eval_path": "the held-out rows"}


@attrs.frozen
class DataFiles:
    """The files of rows.

    Attributes:
        train: to train on; where no file is named, ``train.jsonl`` whether it exists or not.
        held_out: to evaluate on; None if there are none.
    """

    train: Path
    held_out: Path | None


def find_data(folder: Path) -> DataFiles:
    """Look in a folder: what its ``training_contract.yaml`` names, else ``train.jsonl``, else ``validated.jsonl``.

    The held-out rows are those that the same file names, else ``eval.jsonl``, else none.

    Raises:
        DataError: if ``training_contract.yaml`` is malformed or names a file that is not there.
    """
    named = _named(folder / _CONTRACT)
    first, second = folder / "train.jsonl", folder / "validated.jsonl"
    train = named.get("train_path") or (second if second.is_file() and not first.is_file() else first)
    held_out = named.get("eval_path") or folder / "eval.jsonl"
    return DataFiles(train, held_out if held_out.is_file() else None)


def _named(path: Path) -> dict[str, Path]:
    if not path.is_file():
        return {}
    content = read_mapping(path, DataError)
    for key, value in content.items():
        close = difflib.get_close_matches(key, _NAMED, n=1)
        if key not in _NAMED:
            hint = f"; did you mean {close[0]}?" if close else ""
            raise DataError(f"{key} is not a key{hint}", where=path, expected=f"{', '.join(_NAMED)}")
        if not isinstance(value, str) or not (path.parent / value).is_file():
            raise DataError(f"{key} names no file: {value!r}", where=path, expected=f"{_NAMED[key]}, a file")
    return {key: path.parent / value for key, value in content.items()}
