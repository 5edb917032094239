"""The kinds of defect, and the places of a syntax tree where each can be made.

Text inside f-strings, annotations and decorators is left alone: the positions of the first are wrong before Python
3.12, and the others rarely change what a function does.
"""

from __future__ import annotations

import ast
import builtins
import keyword
import re
from collections.abc import Callable, Iterator, Sequence

import attrs

__all__ = ["DEFECTS", "SLIPS", "SPARED_FIELDS", "SPARED_NODES", "SYNTAX_DEFECT", "Defect", "Edit"]

#: The one kind after which the code does not parse.
SYNTAX_DEFECT = "unclosed_bracket"
#: Kinds that nearly every function can have, and that the interpreter finds by itself.
SLIPS = ("undefined_name", SYNTAX_DEFECT)

_COMPARISONS = {
    b"<": b">=",
    b"<=": b">",
    b">": b"<=",
    b">=": b"<",
    b"==": b"!=",
    b"!=": b"==",
    b"is": b"is not",
    b"is not": b"is",
    b"in": b"not in",
    b"not in": b"in",
}
# Without %, which formats strings more often than it divides.
_ARITHMETIC = {b"+": b"-", b"-": b"+", b"*": b"+", b"/": b"*", b"//": b"/", b"**": b"*", b"&": b"|", b"|": b"&"}
_ARITHMETIC |= {b"<<": b">>", b">>": b"<<"}
_LOGIC = {b"and": b"or", b"or": b"and"}

# Calls that give the same whichever argument comes first, or so nearly that nobody would see it.
_SYMMETRIC = {"max", "min", "gcd", "lcm", "hypot", "isclose", "samefile", "sameopenfile", "samestat", "add", "union"}
_SYMMETRIC |= {"print", "multiply", "and_", "or_", "xor", "eq", "ne"}
_SHORTEST_NAME = 4
#: What is left alone: fields of the syntax tree, and kinds of nodes. Template strings are of Python 3.14.
SPARED_FIELDS = {"annotation", "returns", "decorator_list", "type_params"}
SPARED_NODES: tuple[type[ast.AST], ...] = (
    ast.JoinedStr,
    *(getattr(ast, name) for name in ("TemplateStr",) if hasattr(ast, name)),
)


@attrs.frozen
class Edit:
    """A change within one line.

    Attributes:
        line: from 1.
        start: first byte of the line that goes.
        end: byte behind the last one that goes.
        new: what comes instead.
    """

    line: int
    start: int
    end: int
    new: bytes


@attrs.frozen
class Defect:
    """A kind of defect.

    Attributes:
        failure: what the code does wrong, as a sentence; ``{new}`` stands for the new text.
        cause: what was wrong with it, as a sentence.
        edits: (nodes, lines) → every edit that makes such a defect, in the order of the nodes.
    """

    failure: str
    cause: str
    edits: Callable[[Sequence[ast.AST], Sequence[bytes]], Iterator[Edit]]


def _between(left: ast.expr, right: ast.expr, lines: Sequence[bytes], exchange: dict[bytes, bytes]) -> Iterator[Edit]:
    """Exchange the operator between two operands, if they stand on one line."""
    if left.end_lineno != right.lineno or left.end_col_offset is None:
        return
    gap = lines[right.lineno - 1][left.end_col_offset : right.col_offset]
    operator = re.search(rb"[^\s()]+(?:\s+[^\s()]+)*", gap)
    new = exchange.get(b" ".join(operator.group().split())) if operator else None
    if operator and new:
        start, end = (left.end_col_offset + at for at in operator.span())
        yield Edit(right.lineno, start, end, new)


def _comparisons(nodes: Sequence[ast.AST], lines: Sequence[bytes]) -> Iterator[Edit]:
    for node in nodes:
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            yield from _between(node.left, node.comparators[0], lines, _COMPARISONS)


def _arithmetic(nodes: Sequence[ast.AST], lines: Sequence[bytes]) -> Iterator[Edit]:
    for node in nodes:
        if isinstance(node, ast.BinOp):
            yield from _between(node.left, node.right, lines, _ARITHMETIC)


def _logic(nodes: Sequence[ast.AST], lines: Sequence[bytes]) -> Iterator[Edit]:
    for node in nodes:
        if isinstance(node, ast.BoolOp):
            for left, right in zip(node.values, node.values[1:], strict=False):
                yield from _between(left, right, lines, _LOGIC)


def _arguments(nodes: Sequence[ast.AST], lines: Sequence[bytes]) -> Iterator[Edit]:
    for node in nodes:
        if not isinstance(node, ast.Call) or len(node.args) < 2 or _is_symmetric(node.func):
            continue
        first, second = node.args[:2]
        if isinstance(first, ast.Starred) or isinstance(second, ast.Starred) or first.lineno != second.end_lineno:
            continue
        line, end = lines[first.lineno - 1], second.end_col_offset or 0
        one, other = line[first.col_offset : first.end_col_offset], line[second.col_offset : end]
        comma = line[first.end_col_offset : second.col_offset]
        # f(1, 0x1) would be the same as before.
        if ast.dump(first) != ast.dump(second):
            yield Edit(first.lineno, first.col_offset, end, other + comma + one)


def _is_symmetric(function: ast.expr) -> bool:
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return name in _SYMMETRIC or name.lower().startswith("assert")


def _off_by_one(nodes: Sequence[ast.AST], lines: Sequence[bytes]) -> Iterator[Edit]:
    for node in nodes:
        for number in _positions(node):
            inner = number.operand if isinstance(number, ast.UnaryOp) else number
            if isinstance(inner, ast.Constant) and type(inner.value) is int:
                old = lines[inner.lineno - 1][inner.col_offset : inner.end_col_offset]
                if old.isdigit():
                    yield Edit(inner.lineno, inner.col_offset, inner.end_col_offset or 0, b"%d" % (inner.value + 1))


def _positions(node: ast.AST) -> list[ast.expr]:
    """Expressions that count places: indices, ends of slices and ranges, one more and one less."""
    match node:
        case ast.Subscript(slice=ast.Slice(lower=lower, upper=upper)):
            return [end for end in (lower, upper) if end]
        case ast.Subscript(slice=index):
            return [index]
        case ast.Call(func=ast.Name(id="range"), args=ends):
            return ends[:2]
        case ast.BinOp(op=ast.Add() | ast.Sub(), right=ast.Constant(value=1) as one):
            return [one]
    return []


def _returns(nodes: Sequence[ast.AST], lines: Sequence[bytes]) -> Iterator[Edit]:
    # A generator's return value is seen by hardly anyone; a call may well return nothing itself.
    if any(isinstance(node, ast.Yield | ast.YieldFrom) for node in nodes):
        return
    for node in nodes:
        if isinstance(node, ast.Return) and not isinstance(node.value, ast.Call | ast.Await | ast.Constant | None):
            yield from _without_word(b"return", node, lines)


def _awaits(nodes: Sequence[ast.AST], lines: Sequence[bytes]) -> Iterator[Edit]:
    for node in nodes:
        if isinstance(node, ast.Await):
            yield from _without_word(b"await", node, lines)


def _without_word(word: bytes, node: ast.expr | ast.stmt, lines: Sequence[bytes]) -> Iterator[Edit]:
    rest = lines[node.lineno - 1][node.col_offset :]
    blanks = re.match(rb"%s *" % word, rest)
    if blanks and rest[blanks.end() :].strip() not in {b"", b"\\"}:
        yield Edit(node.lineno, node.col_offset, node.col_offset + blanks.end(), b"")


def _names(nodes: Sequence[ast.AST], _lines: Sequence[bytes]) -> Iterator[Edit]:
    names = [node for node in nodes if isinstance(node, ast.Name)]
    bound = {node.id for node in names if isinstance(node.ctx, ast.Store)}
    bound |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    taken = {*bound, *(node.id for node in names), *dir(builtins), *keyword.kwlist}
    for node in names:
        new = _misspelt(node.id)
        if isinstance(node.ctx, ast.Load) and node.id in bound and new and new not in taken:
            yield Edit(node.lineno, node.col_offset, node.col_offset + len(node.id), new.encode())


def _misspelt(name: str) -> str | None:
    """Two neighbouring letters in the middle change places, as they do when one types."""
    # Nobody misspells self, and it stands everywhere.
    if not name.isascii() or len(name) < _SHORTEST_NAME or name == "self":
        return None
    places = [at for at in range(1, len(name) - 1) if name[at : at + 2].isalpha() and name[at] != name[at + 1]]
    if not places:
        return None
    at = places[len(places) // 2]
    return name[:at] + name[at + 1] + name[at] + name[at + 2 :]


def _brackets(nodes: Sequence[ast.AST], _lines: Sequence[bytes]) -> Iterator[Edit]:
    for node in nodes:
        if isinstance(node, ast.Call) and node.end_lineno and node.end_col_offset:
            yield Edit(node.end_lineno, node.end_col_offset - 1, node.end_col_offset, b"")


#: Kind → what it is.
DEFECTS = {
    "negated_comparison": Defect(
        "It takes the wrong turn: where a condition holds, it acts as if it did not.",
        "A comparison said the opposite.",
        _comparisons,
    ),
    "wrong_arithmetic": Defect(
        "It computes a wrong value, or fails with a TypeError where it computes one.",
        "The wrong operator was used.",
        _arithmetic,
    ),
    "wrong_logic": Defect(
        "It combines its conditions wrongly.",
        "`and` and `or` were mixed up.",
        _logic,
    ),
    "swapped_arguments": Defect(
        "It hands two values to a function in each other's place.",
        "Two arguments of a call were swapped.",
        _arguments,
    ),
    "off_by_one": Defect(
        "It is off by one.",
        "A number was off by one.",
        _off_by_one,
    ),
    "dropped_return": Defect(
        "It gives None where it should give a value.",
        "A value was computed and not returned.",
        _returns,
    ),
    "removed_await": Defect(
        "It never awaits a coroutine.",
        "An `await` was missing.",
        _awaits,
    ),
    "undefined_name": Defect(
        "It fails with NameError: name '{new}' is not defined.",
        "A name was misspelt.",
        _names,
    ),
    SYNTAX_DEFECT: Defect(
        "It does not parse: SyntaxError, a bracket is never closed.",
        "A closing bracket was missing.",
        _brackets,
    ),
}
