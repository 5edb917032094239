"""Which files of a data folder hold the rows."""

from __future__ import annotations

import difflib
from pathlib import Path

import attrs

from mens_core.errors import DataError
from mens_core.strict_yaml import read_mapping

__all__ = ["DataFiles", "find_data"]

_CONTRACT = "training_contract.yaml"
# As it stands, packed by gzip, packed by Zstandard.
_FORMS = ("", ".gz", ".zst")
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

    The held-out rows are those that the same file names, else ``eval.jsonl``, else none. A name that is not named
    in the file may end in ``.gz`` or ``.zst``.

    Raises:
        DataError: if ``training_contract.yaml`` is malformed or names a file that is not there, or one name stands
            in the folder in two forms.
    """
    named = _named(folder / _CONTRACT)
    train = named.get("train_path") or _present(folder, "train.jsonl") or _present(folder, "validated.jsonl")
    held_out = named.get("eval_path") or _present(folder, "eval.jsonl")
    return DataFiles(train or folder / "train.jsonl", held_out)


def _present(folder: Path, name: str) -> Path | None:
    found = [path for form in _FORMS if (path := folder / f"{name}{form}").is_file()]
    if len(found) > 1:
        raise DataError(
            f"{name} stands in the folder in {len(found)} forms",
            where=", ".join(map(str, found)),
            expected="one of them",
            fix="delete the others; which of them is meant cannot be told",
        )
    return found[0] if found else None


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
