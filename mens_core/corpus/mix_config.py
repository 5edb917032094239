"""The file that says what is mixed: closed keys, and every problem at once.

    sources:
      - {path: train.jsonl, weight: 3}
      - {path: traces.jsonl, record_format: tool_trace}
    output: mixed/train.jsonl

Paths are relative to the file's folder.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from mens_core.corpus.records import RECORD_FORMATS
from mens_core.errors import DataError
from mens_core.strict_yaml import read_mapping

__all__ = ["DEFAULT_MIX", "MixConfig", "MixSource", "read_mix_config"]

#: The mix that comes with the package, an example that runs as it is.
DEFAULT_MIX = Path(__file__).parents[1] / "mixes" / "default.yaml"


def _is_text(value: object) -> str | None:
    return None if isinstance(value, str) and value.strip() else "must be a text that is not empty"


def _is_switch(value: object) -> str | None:
    return None if isinstance(value, bool) else "must be true or false"


def _is_weight(value: object) -> str | None:
    if not _is_number(value) or value <= 0:  # type: ignore[operator]
        return "must be a number above 0; to take nothing from a source, leave the source out"
    return None


def _is_rate(value: object) -> str | None:
    return None if _is_number(value) and 0 < value <= 1 else "must be a number above 0 and at most 1"  # type: ignore[operator]


def _is_fraction(value: object) -> str | None:
    return None if _is_number(value) and 0 <= value < 1 else "must be a number from 0 to less than 1"  # type: ignore[operator]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_seed(value: object) -> str | None:
    return None if isinstance(value, int) and not isinstance(value, bool) else "must be a whole number"


def _is_size(value: object) -> str | None:
    return None if _is_seed(value) is None and value >= 1 else "must be a whole number above 0"  # type: ignore[operator]


def _is_format(value: object) -> str | None:
    if value in RECORD_FORMATS:
        return None
    close = difflib.get_close_matches(str(value), RECORD_FORMATS, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    return f"must be one of {', '.join(RECORD_FORMATS)}{hint}"


def _is_words(value: object) -> str | None:
    fine = isinstance(value, list) and all(isinstance(word, str) and word.strip() for word in value)
    return None if fine else "must be a list of words"


_SOURCE_KEYS = {
    "path": _is_text,
    "weight": _is_weight,
    "record_format": _is_format,
    "optional": _is_switch,
    "sample_rate": _is_rate,
}
_KEYS = {
    "output": _is_text,
    "include_lanes": _is_words,
    "exclude_lanes": _is_words,
    "seed": _is_seed,
    "eval_fraction": _is_fraction,
    "dedup": _is_switch,
    "total_rows": _is_size,
}


@attrs.frozen(kw_only=True)
class MixSource:
    """A file of rows to mix.

    Attributes:
        path: of the file; plain, gzip or Zstandard.
        weight: share of the output, relative to the other sources' weights; above 0.
        record_format: one of ``RECORD_FORMATS``; None for rows in any form that training reads.
        optional: whether it may be missing, empty, or give nothing.
        sample_rate: share of its rows that are used at all, chosen by content, above 0 and at most 1.
    """

    path: Path
    weight: float = 1.0
    record_format: str | None = None
    optional: bool = False
    sample_rate: float = 1.0


@attrs.frozen(kw_only=True)
class MixConfig:
    """What is mixed, and how.

    Attributes:
        sources: one or more.
        output: the file to write; the held-out rows lie beside it. None if only the command line names it.
        include_lanes: lanes that are used; empty for all.
        exclude_lanes: lanes that are not used.
        seed: of samples, order and held-out part.
        eval_fraction: share of the rows to hold out, from 0 to less than 1.
        dedup: whether of rows that are equal but for blanks only the first is used.
        total_rows: rows to train on; None for as many as the weights need without losing a row.
    """

    sources: tuple[MixSource, ...]
    output: Path | None = None
    include_lanes: tuple[str, ...] = ()
    exclude_lanes: tuple[str, ...] = ()
    seed: int = 0
    eval_fraction: float = 0.05
    dedup: bool = True
    total_rows: int | None = None


def read_mix_config(path: Path) -> MixConfig:
    """Read the file of a mix.

    Raises:
        DataError: if it cannot be read, or listing every key and value that is wrong.
    """
    if not path.is_file():
        raise DataError(
            "the file of the mix does not exist", where=path, expected="a YAML file with sources and output"
        )
    content = read_mapping(path, DataError)
    listed = content.pop("sources", None)
    problems = _problems(content, _KEYS, "", also=("sources",))
    entries = listed if isinstance(listed, list) else []
    if not entries:
        problems.append("sources must be a list of at least one source, each with a path")
    for place, entry in enumerate(entries):
        problems += _source_problems(entry, f"sources[{place}]")
    problems += _lane_problems(content)
    if problems:
        count = "one problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise DataError("\n".join([f"the mix has {count}", *(f"  {problem}" for problem in problems)]), where=path)
    sources = tuple(MixSource(**{**entry, "path": path.parent / entry["path"]}) for entry in entries)
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in content.items()}
    if "output" in values:
        values["output"] = path.parent / values["output"]
    return MixConfig(sources=sources, **values)


def _source_problems(entry: object, where: str) -> list[str]:
    if not isinstance(entry, dict):
        return [f"{where} must be a mapping such as {{path: train.jsonl, weight: 2}} (got {entry!r})"]
    missing = [] if "path" in entry else [f"{where} has no path"]
    return [*_problems(entry, _SOURCE_KEYS, f"{where}."), *missing]


def _problems(content: Mapping[str, Any], keys: Mapping[str, Any], where: str, also: tuple[str, ...] = ()) -> list[str]:
    problems = []
    for key, value in content.items():
        if key not in keys:
            close = difflib.get_close_matches(key, [*keys, *also], n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            problems.append(f"{where}{key} is not a key{hint} (keys: {', '.join([*also, *keys])})")
        elif problem := keys[key](value):
            problems.append(f"{where}{key} {problem} (got {value!r})")
    return problems


def _lane_problems(content: Mapping[str, Any]) -> list[str]:
    included, excluded = (content.get(key) for key in ("include_lanes", "exclude_lanes"))
    if not isinstance(included, list) or not isinstance(excluded, list):
        return []
    return [f"{lane} is both included and excluded" for lane in sorted({*map(str, included)} & {*map(str, excluded)})]
