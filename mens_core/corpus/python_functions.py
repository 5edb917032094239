"""Python source → functions, each cut into its signature, its docstring and its body.

Functions are taken from modules and classes, also under ``if`` and ``try``; a function inside a function
stays a part of it. Comments and formatting survive, since the text is cut and not printed anew. Methods are
moved to the margin, so a body set under its signature parses.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Sequence

import attrs

from mens_core.corpus.syntax import walk

__all__ = ["DocumentedFunction", "functions_of"]

_Function = ast.FunctionDef | ast.AsyncFunctionDef
_Positioned = ast.expr | ast.arg
# From Python 3.12 on a field of an f-string may go over several lines, and f"{x=}" shows its blanks; before, its
# position was that of the whole string.
_TEXT = (ast.Constant, ast.JoinedStr, *((ast.FormattedValue,) if sys.version_info >= (3, 12) else ()))


@attrs.frozen(kw_only=True)
class DocumentedFunction:
    """A function in its three parts, moved to the left margin.

    Attributes:
        name: with the classes round it, ``Decoder.decode``.
        line: of its first decorator or its ``def``, from 1.
        signature: decorators and ``def`` up to and with the colon.
        body: everything under the signature but the docstring, indented; set under the signature it parses.
        docstring: with its indentation removed; None without one.
        idle: whether the body does nothing.
        nodes: of its syntax tree, from ``walk``, with the docstring and the positions it has in its file.
    """

    name: str
    line: int
    signature: str
    body: str
    docstring: str | None
    idle: bool
    nodes: Sequence[ast.AST] = attrs.field(repr=False, eq=False)

    @property
    def whole(self) -> str:
        """The signature with the body under it; it parses unless the function is idle."""
        return f"{self.signature}\n{self.body}"


def functions_of(text: str) -> Iterator[DocumentedFunction]:
    """Cut every function of a module and its classes; raises what ``ast.parse`` raises."""
    # Column offsets of the syntax tree count UTF-8 bytes.
    lines = text.encode().split(b"\n")
    for name, node in _definitions(ast.parse(text), ""):
        yield _cut(name, node, lines)


def _definitions(node: ast.AST, prefix: str) -> Iterator[tuple[str, _Function]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, _Function):
            yield prefix + child.name, child
        elif isinstance(child, ast.ClassDef):
            yield from _definitions(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):
            yield from _definitions(child, prefix)


def _cut(name: str, node: _Function, lines: Sequence[bytes]) -> DocumentedFunction:
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    last = node.end_lineno or node.lineno
    nodes = walk(node)
    inside_strings = _inside_strings(nodes, lines) if node.col_offset else set()

    def moved(number: int, end: int | None = None) -> bytes:
        line = lines[number - 1][:end]
        # Spaces at the start of a string's second line are part of its value.
        return line if number in inside_strings else _unindented(line, node.col_offset)

    signature_line, signature_end = _signature_end(node, lines)
    signature = [*map(moved, range(first, signature_line)), moved(signature_line, signature_end)]
    docstring, statements = ast.get_docstring(node), node.body
    body_line, body_start = signature_line, signature_end
    if docstring is not None:
        body_line, body_start = statements[0].end_lineno or last, statements[0].end_col_offset or 0
        statements = statements[1:]
    beside = lines[body_line - 1][body_start:].strip(b" \t;")
    body = [] if not beside or beside.startswith(b"#") else [b"    " + beside]
    body += map(moved, range(body_line + 1, last + 1))
    return DocumentedFunction(
        name=name,
        line=first,
        signature=b"\n".join(signature).decode(),
        body=b"\n".join(body).decode().strip("\n").rstrip(),
        docstring=docstring,
        idle=_is_idle(statements),
        nodes=nodes,
    )


def _unindented(line: bytes, margin: int) -> bytes:
    """The line without up to ``margin`` leading blanks; a comment may stand left of its function."""
    return line[min(margin, len(line) - len(line.lstrip(b" \t"))) :]


def _signature_end(node: _Function, lines: Sequence[bytes]) -> tuple[int, int]:
    """Line (from 1) and column (in bytes) behind the colon that ends the signature."""
    arguments = node.args
    parts: list[ast.AST | None] = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    parts += [arguments.vararg, arguments.kwarg, *arguments.defaults, *arguments.kw_defaults, node.returns]
    # Python 3.12 and later: def name[T](…)
    parts += getattr(node, "type_params", [])
    ends = [(part.end_lineno or 0, part.end_col_offset or 0) for part in parts if isinstance(part, _Positioned)]
    number, column = max([(node.lineno, node.col_offset), *ends])
    # Behind the last part there are only brackets, commas, blanks and comments before the colon.
    while (colon := lines[number - 1][column:].partition(b"#")[0].find(b":")) < 0:
        number, column = number + 1, 0
    return number, column + colon + 1


def _inside_strings(nodes: Sequence[ast.AST], lines: Sequence[bytes]) -> set[int]:
    """Numbers of the lines that begin inside a string."""
    inside: set[int] = set()
    for part in nodes:
        if not isinstance(part, _TEXT) or part.end_lineno in {None, part.lineno}:
            continue
        piece = lines[part.lineno - 1 : part.end_lineno]
        # Otherwise they are strings set under one another, each of them closed on its line.
        one_string = any(b'"""' in line or b"'''" in line or line.endswith(b"\\") for line in piece)
        if one_string or isinstance(part, ast.FormattedValue):
            inside.update(range(part.lineno + 1, part.lineno + len(piece)))
    return inside


def _is_idle(statements: Sequence[ast.stmt]) -> bool:
    match statements:
        case [] | [ast.Pass()] | [ast.Expr(value=ast.Constant())]:
            return True
        case [ast.Raise(exc=ast.Name(id="NotImplementedError") | ast.Call(func=ast.Name(id="NotImplementedError")))]:
            return True
    return False
