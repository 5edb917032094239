"""One line → one JSON object, strictly: no key twice, no number that is no JSON, nothing rounded in silence.

orjson is several times faster than the standard library, but keeps the last of two equal keys and turns whole
numbers beyond 64 bits into floats. What it read is believed only where neither can have happened; every other line,
and every line it refuses, goes to the exact reader, which says what is wrong.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import orjson

from mens_core.corpus.faults import Fault, kind_of, shortened

__all__ = ["read_object"]

# At least one match for every key of a line that is JSON: the colon after a key follows its closing quote, directly or
# after blanks. A quote behind exactly one backslash is escaped and closes nothing, so it is not counted (texts are full
# of them); whatever else looks like a key in a text is counted, which costs time and nothing else.
_COLON_OF_KEY = re.compile(rb':(?:(?<=":)(?<![^\\]\\":)|(?<="[ \t\r]:)|(?<=[ \t\r]{2}:))')
_LARGEST_EXACT = 2**63
_UNBELIEVABLE = 1 << 60
_SURROGATE = re.compile("[\ud800-\udfff]")


def read_object(line: bytes, form: str) -> dict[str, Any]:
    """Parse one line.

    Args:
        line: UTF-8.
        form: what should stand in it, for messages.

    Raises:
        Fault: if it is blank, no UTF-8, no JSON, no object, gives a key twice, or holds NaN, an infinite number or
            half of a surrogate pair.
    """
    try:
        record = orjson.loads(line)
        # Equal keys leave fewer in the objects than there are in the line, and never more.
        if type(record) is dict and _keys(record) == len(_COLON_OF_KEY.findall(line)):
            return record
    except (orjson.JSONDecodeError, RecursionError):
        pass
    return _exactly(line, form)


def _keys(value: Any) -> int:
    """Keys of all objects within a value; more than a line can hold if a number in it may have been rounded."""
    count = 0
    if type(value) is dict:
        count = len(value)
        value = value.values()
    for member in value:
        kind = type(member)
        if kind is dict or kind is list:
            count += _keys(member)
        elif kind is float and not -_LARGEST_EXACT < member < _LARGEST_EXACT:
            count += _UNBELIEVABLE
    return count


def _exactly(line: bytes, form: str) -> dict[str, Any]:
    if not line.strip():
        raise Fault("a blank line", "one JSON object on every line")
    try:
        record = json.loads(
            line.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_constant, parse_float=_finite
        )
        broken = {name for name in record if _broken(name, record[name])} if isinstance(record, dict) else set()
    except UnicodeDecodeError as error:
        raise Fault("not UTF-8", f"UTF-8 text; the first wrong byte is {line[error.start]:#04x}") from error
    except json.JSONDecodeError as error:
        raise Fault(f"not JSON: {error.msg}", f"{form}; see column {error.colno}") from error
    except ValueError as error:
        raise Fault(f"not JSON: {error}", form) from error
    except RecursionError as error:
        raise Fault("JSON nested too deeply", form) from error
    if not isinstance(record, dict):
        raise Fault(f"a JSON {kind_of(record)} instead of an object", form)
    if broken:
        raise Fault(f"{shortened(min(broken))} holds half of a surrogate pair", "characters that UTF-8 can write")
    return record


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise Fault(f"the key {shortened(key)} given twice in one object", "each key once")
    return record


def _constant(name: str) -> None:
    raise Fault(f"not JSON: {name}", "a finite number, or null")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise Fault("a number beyond every float", "a number of at most 1.8e308, or a text")
    return value


def _broken(name: str, value: Any) -> bool:
    return any(_SURROGATE.search(text) for text in (name, *_texts(value)))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for member in value:
            yield from _texts(member)
    elif isinstance(value, dict):
        yield from value
        for member in value.values():
            yield from _texts(member)
