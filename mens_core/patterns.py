"""Regular expressions for module paths, as PEFT writes them: matched only where that ends soon.

Python's matcher tries every way to divide a text among repeats. One repeat within another takes twice as long for
every letter, and so can a reference to what was found; both are refused, as are more repeats than any name needs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TypeVar

from mens_core.errors import ModelError

__all__ = ["check_pattern", "matches", "number_of"]

_Number = TypeVar("_Number", int, float)

_LONGEST, _MOST_REPEATS = 1000, 4
_ESCAPED_OR_SET = re.compile(r"\\[^0-9]|\[\^?\]?[^\]]*\]")
_REPEATED_GROUP = re.compile(r"\)[*+{]|\\[0-9]|\(\?P=")


def check_pattern(pattern: str) -> str:
    """Return a pattern that can be matched with module paths.

    Raises:
        ModelError: if it is no regular expression, or may take for ever.
    """
    bare = _ESCAPED_OR_SET.sub("x", pattern)
    repeats = sum(bare.count(mark) for mark in "*+{")
    if len(pattern) > _LONGEST or repeats > _MOST_REPEATS or _REPEATED_GROUP.search(bare):
        raise ModelError(
            "a pattern of the adapter may take for ever",
            where=pattern[:100],
            expected=f"at most {_MOST_REPEATS} repeats, none of a group, no references",
        )
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ModelError(f"a pattern of the adapter is no regular expression: {error}", where=pattern[:100]) from error
    return pattern


def matches(pattern: str, module: str) -> bool:
    """Whether a pattern is a module's path or the end of it, as PEFT reads ``rank_pattern`` and ``alpha_pattern``.

    Source: github.com/huggingface/peft, ``utils/other.py``, ``get_pattern_key``.
    """
    return re.match(rf"(.*\.)?({pattern})$", module) is not None


def number_of(patterns: Iterable[tuple[str, _Number]], module: str, default: _Number) -> _Number:
    """The number of the first pattern that matches a module; else the default."""
    return next((number for pattern, number in patterns if matches(pattern, module)), default)
