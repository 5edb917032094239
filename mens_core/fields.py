"""Makers of contract fields: a default, a help text, how text becomes a value, and what a value must be.

Everything stands in the attrs metadata: ``help``, ``parse`` (text → value), ``check`` (value → what is wrong with it,
or None), and where they apply ``unit``, ``choices``, ``aliases``, ``flag``, ``metavar``, ``evidence``, ``required``;
``digest`` is False for what does not change a run's result (places, limits, and what enters by its content),
``as_text`` true for what a file or a library call may give as the text one writes on the command line, ``pairs`` true
for what they give as a mapping.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs

from mens_core.errors import ContractError, ModelError
from mens_core.patterns import check_pattern
from mens_core.sizes import read_size

__all__ = [
    "choice",
    "duration",
    "integer",
    "names",
    "number",
    "path",
    "pattern",
    "patterns",
    "size",
    "switch",
    "text",
]

_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*([smhd]?)")
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


def _checked(_: object, attribute: attrs.Attribute[Any], value: object) -> None:
    problem = attribute.metadata["check"](value)
    if problem:
        raise ContractError(f"{attribute.name} {problem}", where=f"{attribute.name} = {value!r}")


def _field(
    default: Any,
    help_text: str,
    *,
    parse: Callable[[str], Any],
    check: Callable[[Any], str | None],
    **extra: Any,
) -> Any:
    metadata = {"help": help_text, "parse": parse, "check": check, "digest": True, **extra}
    return attrs.field(default=default, metadata=metadata, validator=_checked)


def integer(default: int | None, help_text: str, *, low: int, high: float = math.inf, **extra: Any) -> Any:
    """A whole number within [low, high]; None is allowed where it is the default."""

    def check(value: object) -> str | None:
        if value is None and default is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            return f"must be a whole number of at least {low}" + (f" and at most {high}" if high < math.inf else "")
        return None

    return _field(default, help_text, parse=int, check=check, **extra)


def number(
    default: float | None,
    help_text: str,
    *,
    low: float,
    high: float = math.inf,
    below: float = math.inf,
    exclusive: bool = False,
    **extra: Any,
) -> Any:
    """A finite number within [low, high] and less than ``below``, above ``low`` if exclusive.

    None is allowed where it is the default.
    """

    def check(value: object) -> str | None:
        if value is None and default is None:
            return None
        fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        in_range = fits and low <= value <= high and value < below  # type: ignore[operator]
        if not in_range or (exclusive and value == low):
            least = f"must be a finite number {'above' if exclusive else 'of at least'} {low:g}"
            most = f" and at most {high:g}" if high < math.inf else ""
            return least + most + (f" and below {below:g}" if below < math.inf else "")
        return None

    return _field(default, help_text, parse=float, check=check, **extra)


def size(default: int | None, help_text: str, **extra: Any) -> Any:
    """A number of bytes, written as 6GiB, 800MB and the like, or as a plain number of bytes."""

    def check(value: object) -> str | None:
        if value is None and default is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            return "must be a size such as 6GiB, 800MB or a number of bytes"
        return None

    return _field(default, help_text, parse=read_size, check=check, metavar="SIZE", as_text=True, **extra)


def duration(help_text: str, **extra: Any) -> Any:
    """Seconds, none by default; written as 90s, 30m, 2h and the like, or as a plain number of seconds."""

    def check(value: object) -> str | None:
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            return "must be a duration such as 90s, 30m, 2h or a number of seconds"
        return None

    return _field(None, help_text, parse=_seconds, check=check, metavar="TIME", as_text=True, **extra)


def _seconds(text: str) -> float:
    found = _DURATION.fullmatch(text.strip().lower())
    if found is None:
        raise ValueError(f"{text!r} is not a duration such as 90s, 30m, 2h or a number of seconds")
    return float(found[1]) * _SECONDS[found[2]]


def choice(default: str, choices: tuple[str, ...], help_text: str, **extra: Any) -> Any:
    """One of a few words; a wrong one is met with the nearest."""

    def check(value: object) -> str | None:
        if value in choices:
            return None
        close = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        return f"must be one of {', '.join(choices)}{hint}"

    return _field(default, help_text, parse=str, check=check, choices=choices, **extra)


def switch(default: bool, help_text: str, **extra: Any) -> Any:
    """True or false; its flag names the opposite of the default."""

    def check(value: object) -> str | None:
        return None if isinstance(value, bool) else "must be true or false"

    return _field(default, help_text, parse=bool, check=check, **extra)


def text(default: str | None, help_text: str, **extra: Any) -> Any:
    """A text that is not empty; None is allowed where it is the default."""

    def check(value: object) -> str | None:
        if (value is None and default is None) or (isinstance(value, str) and value.strip()):
            return None
        return "must be a text that is not empty"

    return _field(default, help_text, parse=str, check=check, **extra)


def pattern(default: str, expression: str, help_text: str, **extra: Any) -> Any:
    """A word of a certain form; the metavar says which."""

    def check(value: object) -> str | None:
        if isinstance(value, str) and re.fullmatch(expression, value):
            return None
        return f"must be one of {extra['metavar'].replace('|', ', ')}"

    return _field(default, help_text, parse=str, check=check, **extra)


def path(help_text: str, **extra: Any) -> Any:
    """A path, none by default; ``required`` in the metadata says that training needs it."""

    def check(value: object) -> str | None:
        return None if value is None or isinstance(value, Path) else "must be a path"

    return _field(None, help_text, parse=_path, check=check, as_text=True, **extra)


def _path(text: str) -> Path:
    if not text.strip():
        raise ValueError("a path must not be empty")
    return Path(text)


def names(default: tuple[str, ...], help_text: str, **extra: Any) -> Any:
    """A tuple of names, written with commas on the command line; none is allowed where that is the default."""

    def parse(text: str) -> tuple[str, ...]:
        aliases: Mapping[str, str] = extra.get("aliases", {})
        return tuple(aliases.get(part.strip(), part.strip()) for part in text.split(",") if part.strip())

    def check(value: object) -> str | None:
        named = isinstance(value, tuple) and all(isinstance(name, str) and name for name in value)
        if named and (value or not default):
            return None
        return "must be at least one name" if default else "must be names"

    return _field(default, help_text, parse=parse, check=check, as_text=True, **extra)


def patterns(kind: type[int | float], help_text: str, **extra: Any) -> Any:
    """Patterns for module paths with a number each, none by default; the first that matches counts.

    A mapping in a file or a call, ``NAME=NUMBER,NAME=NUMBER`` on the command line, pairs in the contract.

    Args:
        kind: of the numbers, which are above 0.
        help_text: for people.
        **extra: further metadata.
    """

    def parse(text: str) -> tuple[tuple[str, int | float], ...]:
        parts = [part.rpartition("=") for part in text.split(",") if part.strip()]
        return tuple((name.strip(), kind(number)) for name, _, number in parts)

    def check(value: object) -> str | None:
        if not isinstance(value, tuple) or not all(isinstance(pair, tuple) and len(pair) == 2 for pair in value):
            return "must be patterns with a number each, such as q_proj=8,v_proj=4, in a file a mapping"
        for name, number in value:
            fits = isinstance(number, kind) and not isinstance(number, bool) and math.isfinite(number) and number > 0
            if not (isinstance(name, str) and name and fits):
                return f"must have a {'whole' if kind is int else 'finite'} number above 0 for each pattern"
            try:
                check_pattern(name)
            except ModelError as error:
                return f"holds {error.where!r}, where {error.what}"
        return None

    return _field((), help_text, parse=parse, check=check, pairs=True, as_text=True, kind=kind, **extra)
