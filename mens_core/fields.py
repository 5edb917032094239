"""Makers of contract fields: a default, a help text, how text becomes a value, and what a value must be.

Everything stands in the attrs metadata: ``help``, ``parse`` (text → value), ``check`` (value → what is wrong with it,
or None), and where they apply ``unit``, ``choices``, ``aliases``, ``flag``, ``metavar``, ``evidence``, ``required``.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs

from mens_core.errors import ContractError

__all__ = ["choice", "folder", "integer", "names", "number", "switch", "text"]


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
    metadata = {"help": help_text, "parse": parse, "check": check, **extra}
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


def number(default: float, help_text: str, *, low: float, exclusive: bool = False, **extra: Any) -> Any:
    """A finite number of at least ``low``, or above it if exclusive."""

    def check(value: object) -> str | None:
        fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not fits or value < low or (exclusive and value == low):  # type: ignore[operator]
            return f"must be a finite number {'above' if exclusive else 'of at least'} {low:g}"
        return None

    return _field(default, help_text, parse=float, check=check, **extra)


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


def folder(help_text: str, **extra: Any) -> Any:
    """A path that training requires."""

    def check(value: object) -> str | None:
        return None if value is None or isinstance(value, Path) else "must be a path"

    return _field(None, help_text, parse=Path, check=check, required=True, **extra)


def names(default: tuple[str, ...], help_text: str, **extra: Any) -> Any:
    """A tuple of names, written with commas on the command line."""

    def parse(text: str) -> tuple[str, ...]:
        return tuple(part.strip() for part in text.split(",") if part.strip())

    def check(value: object) -> str | None:
        if isinstance(value, tuple) and value and all(isinstance(name, str) and name for name in value):
            return None
        return "must name at least one module"

    return _field(default, help_text, parse=parse, check=check, **extra)
