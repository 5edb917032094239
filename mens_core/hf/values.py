"""The values of config.json, read one by one; what is wrong with them is kept, to be told together."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from typing import Any

from mens_core.hf.families import UNKNOWN, Family

__all__ = ["Values", "is_positive"]

_MOST = 2**31 - 1


class Values:
    """Reads values under the names a family gives them.

    Args:
        text: the part of config.json that describes the decoder.
        family: its spellings and defaults.

    Attributes:
        problems: a sentence for each wrong value met so far.
    """

    def __init__(self, text: Mapping[str, Any], family: Family) -> None:
        self.text, self.family = text, family
        self.problems: list[str] = []

    def count(self, key: str, otherwise: int | None = None, *, least: int = 1, most: int = _MOST) -> int:
        """A whole number from ``least`` to ``most``; a wrong one is a problem and read as ``least``.

        Args:
            key: in Llama's spelling.
            otherwise: what stands for null, and for a missing key if the family has no default.
            least: the smallest that makes sense, 0 or 1.
            most: the largest.
        """
        name, value = self._given(key, otherwise)
        if type(value) is int and least <= value <= most:
            return value
        kind = "positive whole number" if least else "whole number from 0"
        self.refuse(name, value, f"a {kind} up to {most}")
        return least

    def epsilon(self, key: str) -> float:
        """A number between 0 and 1; 1e-6 where config.json has none."""
        name, value = self._given(key, 1e-6)
        if is_positive(value) and value < 1:
            return float(value)
        self.refuse(name, value, "a number between 0 and 1")
        return 1e-6

    def flag(self, key: str) -> bool:
        """True or false; false where neither config.json nor the family says so."""
        name, value = self._given(key, False)
        if not isinstance(value, bool):
            self.refuse(name, value, "true or false")
        return value is True

    def strings(self, key: str, source: Mapping[str, Any]) -> tuple[str, ...] | None:
        """A list of texts in this part of config.json; None where it has none."""
        value = source.get(key)
        if value is None:
            return None
        if isinstance(value, list) and all(isinstance(each, str) for each in value):
            return tuple(value)
        self.refuse(key, value, "a list of texts")
        return None

    def refuse(self, key: str, value: object, wanted: str) -> None:
        """Note that a value cannot be used."""
        self.problems.append(f"no usable {key}: {reprlib.repr(value)}, where {wanted} is expected")

    def _given(self, key: str, otherwise: Any) -> tuple[str, Any]:
        """The name a key has here, and its value."""
        names = self.family.spellings.get(key, (key,))
        given = {name: self.text[name] for name in names if self.text.get(name) is not None}
        values = list(given.values())
        # What another family means by a second spelling is not known.
        if self.family is not UNKNOWN and any(value != values[0] for value in values[1:]):
            self.problems.append(f"{' and '.join(given)} contradict each other: {reprlib.repr(values)}")
        if given:
            return next(iter(given.items()))
        null = any(name in self.text for name in names) and otherwise is not None
        return next(iter(names), key), otherwise if null else self.family.defaults.get(key, otherwise)


def is_positive(value: object) -> bool:
    """Whether this is a finite number above 0, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
