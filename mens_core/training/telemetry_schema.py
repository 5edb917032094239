"""The shipped schema of telemetry.jsonl, and whether a line keeps it.

The schema is JSON Schema, draft 2020-12, for whoever reads telemetry elsewhere; what it uses of that is little enough
to be checked here without a library: types, ranges, words, and no field too many or too few.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["SCHEMA_FILE", "find_problem", "telemetry_schema"]

SCHEMA_FILE = Path(__file__).with_name("telemetry_schema.json")


@functools.cache
def telemetry_schema() -> dict[str, Any]:
    """The schema as it is shipped."""
    schema: dict[str, Any] = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    return schema


def find_problem(record: object) -> str | None:
    """What keeps a value from being a line of telemetry.jsonl; None if nothing does."""
    schema = telemetry_schema()
    problem = _problem(record, schema, "line")
    if problem is not None:
        return problem
    assert isinstance(record, dict), "the schema says so"
    return _problem(record["payload"], schema["$defs"][record["event"]], record["event"])


def _problem(value: object, schema: Mapping[str, Any], where: str) -> str | None:
    problem = _problem_of_value(value, schema)
    if problem is not None:
        return f"{where} {problem}"
    if isinstance(value, list) and "items" in schema:
        return _first(_problem(item, schema["items"], f"{where}[{place}]") for place, item in enumerate(value))
    return _problem_of_fields(value, schema, where) if isinstance(value, dict) else None


def _problem_of_value(value: object, schema: Mapping[str, Any]) -> str | None:
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(_KINDS[kind](value) for kind in kinds):
        return f"is no {' or '.join(kinds)}"
    words = schema.get("enum", [schema["const"]] if "const" in schema else [])
    if words and not any(_same(value, word) for word in words):
        return f"is not {' or '.join(map(str, words))}"
    if isinstance(value, str) and "pattern" in schema and not re.search(schema["pattern"], value):
        return f"has another form than {schema['pattern']}"
    return "is out of range" if _is_number(value) and not _is_within(value, schema) else None


def _problem_of_fields(value: Mapping[str, Any], schema: Mapping[str, Any], where: str) -> str | None:
    fields: Mapping[str, Any] = schema.get("properties", {})
    missing = [name for name in schema.get("required", ()) if name not in value]
    if missing:
        return f"{where} has no {missing[0]}"
    unknown = [] if schema.get("additionalProperties", True) else [name for name in value if name not in fields]
    if unknown:
        return f"{where} has an unknown field {unknown[0]}"
    return _first(_problem(value[name], field, f"{where}.{name}") for name, field in fields.items() if name in value)


def _first(problems: Iterable[str | None]) -> str | None:
    return next((problem for problem in problems if problem is not None), None)


def _same(value: object, word: object) -> bool:
    # To Python, 1 is True.
    return value == word and isinstance(value, bool) == isinstance(word, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_within(value: Any, schema: Mapping[str, Any]) -> bool:
    low, above, high = (schema.get(name) for name in ("minimum", "exclusiveMinimum", "maximum"))
    return (low is None or value >= low) and (above is None or value > above) and (high is None or value <= high)


_KINDS: Mapping[str, Callable[[Any], bool]] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    # NaN and infinity are no JSON; Python's own reader lets them in.
    "number": lambda value: _is_number(value) and math.isfinite(value),
    "integer": lambda value: _is_number(value) and math.isfinite(value) and value == int(value),
}
