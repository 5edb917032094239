"""How a failure is told: what broke, and the paragraph of the hook's specification that says otherwise."""

from __future__ import annotations

import inspect
import textwrap

import pytest

from mens_core import hookspecs

__all__ = ["paragraph", "promise"]


def promise(kept: object, hook: str, phrase: str, broken: str) -> None:
    """Fail unless a promise of a hook is kept.

    Args:
        kept: whether it is.
        hook: the hook's name.
        phrase: words of the paragraph of the hook's docstring that makes the promise.
        broken: what happened instead, one sentence.
    """
    __tracebackhide__ = True
    said = paragraph(hook, phrase)
    if not kept:
        quoted = textwrap.indent(said, "    ")
        pytest.fail(f"{hook}: {broken}\n\n  {hookspecs.__name__}.{hook} says:\n\n{quoted}", pytrace=False)


def paragraph(hook: str, phrase: str) -> str:
    """The paragraph of a hook's docstring that holds the phrase, line breaks aside.

    Raises:
        LookupError: if no paragraph does, so that a test cannot cite what is not written.
    """
    for text in (inspect.getdoc(getattr(hookspecs, hook)) or "").split("\n\n"):
        if phrase in " ".join(text.split()):
            return text
    raise LookupError(f"mens_core.hookspecs.{hook} does not say {phrase!r}")
