"""A sandbox for chat templates that also bounds their work: steps, processor time, and the size of what they make.

Jinja's own keeps a template from files, imports, attributes that begin with an underscore and ranges of more than
100,000 numbers. A loop in a loop, a text that is doubled or padded, and a macro that calls itself twice remain; here
every pass of a loop and every call is counted, and every operation that makes something larger says how large before
it makes it. Real templates stay a thousandfold below each bound, so that none is ever reached by a row.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Iterable
from typing import Any

from jinja2 import nodes, sandbox
from jinja2.compiler import CodeGenerator, Frame
from jinja2.runtime import Context, str_join

from mens_core.errors import ModelError

__all__ = ["BoundedSandbox", "EndlessTemplateError"]

_MOST_STEPS = 1_000_000
# Of which a collection of garbage may take one or two where a process holds many objects.
_MOST_SECONDS = 4.0
_LONGEST, _MOST_MADE = 32_000_000, 256_000_000
_WIDEST = 1_000_000
_LARGEST_BITS = 4096
_WIDEST_INDENT = 16

_SEQUENCES = (str, list, tuple)
_INTERCEPTED = frozenset({"*", "**", "%"})
# A number of six digits in a format, a width taken from the arguments, or a field within a field.
_WIDE_FORMAT = re.compile(r"\d{6}|%[^%a-zA-Z]*\*|\{[^{}]*\{")
# What no chat template uses: they draw lots, or make much of little.
_NO_FILTERS = "batch center filesizeformat pprint random slice striptags truncate urlize wordwrap xmlattr forceescape"

# What makes nothing that is longer than what it is given, or three times as long, once.
# fmt: off
_SHRINKING_FILTERS = {
    "abs", "attr", "capitalize", "count", "d", "default", "e", "escape", "first", "float", "int", "items", "last",
    "length", "lower", "safe", "title", "trim", "upper",
}
_SHRINKING_METHODS = {
    "capitalize", "count", "endswith", "find", "index", "isalnum", "isalpha", "isdigit", "islower", "isnumeric",
    "isspace", "isupper", "lower", "lstrip", "partition", "removeprefix", "removesuffix", "rfind", "rpartition",
    "rstrip", "startswith", "strip", "title", "upper",
}
# fmt: on


class EndlessTemplateError(ModelError):
    """A template was stopped: it works without end, or makes something without end; with other rows it would, too."""

    def __init__(self, what: str) -> None:
        super().__init__(f"the chat template {what}", fix="take it from the model's own page")


class _Generator(CodeGenerator):
    """Jinja's, with texts added and joined where they are counted."""

    def visit_Add(self, node: nodes.BinExpr, frame: Frame) -> None:  # noqa: N802 (Jinja's name)
        """Write a call of ``BoundedSandbox.add``."""
        self._write_call("add", (node.left, node.right), frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802 (Jinja's name)
        """Write a call of ``BoundedSandbox.join_texts``."""
        self._write_call("join_texts", node.nodes, frame)

    def _write_call(self, method: str, parts: Iterable[nodes.Expr], frame: Frame) -> None:
        self.write(f"environment.{method}(")
        for part in parts:
            self.visit(part, frame)
            self.write(", ")
        self.write(")")


class BoundedSandbox(sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox with the bounds; ``begin`` is called before every rendering."""

    code_generator_class = _Generator
    intercepted_binops = _INTERCEPTED

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.begin()
        self.globals.pop("lipsum")
        for name in _NO_FILTERS.split():
            self.filters.pop(name, None)
        for name, written in [*self.filters.items()]:
            self.add_filter(name, written)
        self.concat = self._joined  # type: ignore[method-assign]

    def begin(self) -> None:
        """Forget what was done for another text."""
        self._steps, self._made, self._started = 0, 0, time.thread_time()

    @property
    def tick(self) -> None:
        """Looked at in every pass of a loop, for that is cheaper than a call; a step has been taken."""
        self._steps += 1
        if self._steps % 64 and self._steps <= _MOST_STEPS:
            return
        if self._steps > _MOST_STEPS or time.thread_time() - self._started > _MOST_SECONDS:
            raise EndlessTemplateError("works without end")

    def add_filter(self, name: str, written: Callable[..., Any]) -> None:
        """Offer a filter, bounded as the others are."""
        self.filters[name] = written if name in _SHRINKING_FILTERS else self._bounded(name, written)

    def parse(self, *args: Any, **kwargs: Any) -> nodes.Template:
        """Parse a template such that every pass of its loops is counted."""
        tree = super().parse(*args, **kwargs)
        for loop in list(tree.find_all(nodes.For)):
            loop.body.insert(0, nodes.ExprStmt(nodes.EnvironmentAttribute("tick"), lineno=loop.lineno))
        return tree

    def call(self, context: Context, called: Any, *args: Any, **kwargs: Any) -> Any:
        """Call what a template calls, counted, if it makes nothing endless."""
        _ = self.tick
        owner = getattr(getattr(called, "__wrapped__", called), "__self__", None)
        if isinstance(owner, str):
            method = getattr(called, "__name__", "")
            if method not in _SHRINKING_METHODS:
                args = self._weighed(method, owner, args, kwargs)
        return self._noted(super().call(context, called, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Multiply, take powers and format, if nothing endless comes of it."""
        if operator == "%":
            if isinstance(left, str):
                _check_format(left)
        elif isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > _LARGEST_BITS:
                raise EndlessTemplateError("makes an endless number")
        else:
            times, what = (left, right) if isinstance(left, int) else (right, left)
            if isinstance(times, int) and isinstance(what, _SEQUENCES):
                self._make(max(0, times) * len(what))
        return self._noted(super().call_binop(context, operator, left, right))

    def add(self, left: Any, right: Any) -> Any:
        """``+``, if the sum is not endless."""
        if isinstance(left, _SEQUENCES) and isinstance(right, _SEQUENCES):
            self._make(len(left) + len(right))
        return left + right

    def join_texts(self, *parts: Any) -> str:
        """``~``, if the text is not endless."""
        self._make(sum(len(part) for part in parts if isinstance(part, str)))
        return str_join(parts)

    def _make(self, size: int) -> None:
        """Told before something of a size, in characters or members, is made."""
        self._made += size
        if size > _LONGEST or self._made > _MOST_MADE:
            raise EndlessTemplateError("makes an endless text")

    def _joined(self, pieces: Iterable[str]) -> str:
        """What a macro or a block writes."""
        parts = list(pieces)
        self._make(sum(map(len, parts)))
        return "".join(parts)

    def _noted(self, value: Any) -> Any:
        if isinstance(value, str):
            self._make(len(value))
        return value

    def _weighed(self, method: str, text: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """Refuse a call of a text's method that makes something endless; returns the arguments to call it with."""
        _check_numbers((*args, *kwargs.values()))
        texts = [argument for argument in (*args, *kwargs.values()) if isinstance(argument, str)]
        match method:
            case "format" | "format_map":
                _check_format(text)
                self._make(len(text) + text.count("{") * max(map(len, texts), default=0))
            case "replace":
                self._make(len(text) + (len(text) + 1) * _growth(texts))
            case "expandtabs" | "translate":
                raise EndlessTemplateError(f"uses {method}, which none needs")
            case "join" if args:
                parts = list(args[0])
                self._make(sum(map(len, filter(_is_text, parts))) + len(text) * len(parts))
                return (parts, *args[1:])
            case _:
                self._make(len(text))
        return args

    def _bounded(self, name: str, written: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that refuses what would be endless."""

        # Jinja's marks for what a filter is given first come with it.
        @functools.wraps(written)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            given = (*args, *kwargs.values())
            _ = self.tick
            _check_numbers(given)
            texts = [argument for argument in given if isinstance(argument, str)]
            self._make(sum(len(found) for found in given if isinstance(found, _SEQUENCES)))
            if name == "format":
                _check_format(texts[0] if texts else "")
            elif name == "replace" and texts:
                self._make((len(texts[0]) + 1) * _growth(texts[1:]))
            elif name == "sum" and any(isinstance(start, _SEQUENCES) for start in given[2:]):
                raise EndlessTemplateError("adds up lists")
            elif name == "indent" and texts:
                width = max([4, *(n for n in given[1:] if isinstance(n, int)), *map(len, texts[1:])])
                self._make(texts[0].count("\n") * width)
            elif name == "tojson":
                _check_indent(given[1:], kwargs)
            elif name == "join":
                separator = max((len(found) for found in texts), default=0)
                args = tuple(list(part) if hasattr(part, "__next__") else part for part in args)
                members = max((len(part) for part in args if isinstance(part, list | tuple | str)), default=0)
                self._make(separator * members)
            return self._noted(written(*args, **kwargs))

        return bounded


def _check_numbers(arguments: Iterable[Any]) -> None:
    if any(isinstance(argument, int) and abs(argument) > _WIDEST for argument in arguments):
        raise EndlessTemplateError("asks for an endless width")


def _check_format(text: str) -> None:
    if _WIDE_FORMAT.search(text):
        raise EndlessTemplateError("formats to an endless width")


def _growth(texts: list[str]) -> int:
    """How much longer a text may become by a replacement, for each of its letters."""
    old, new = (*texts, "", "")[:2]
    return -(-len(new) // max(1, len(old)))


def _check_indent(positional: Iterable[Any], named: dict[str, Any]) -> None:
    for indent in (*positional, *named.values()):
        wide = len(indent) if isinstance(indent, str) else indent if isinstance(indent, int) else 0
        if wide > _WIDEST_INDENT:
            raise EndlessTemplateError("indents to an endless width")


def _is_text(value: object) -> bool:
    return isinstance(value, str)
