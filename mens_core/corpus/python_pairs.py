"""Python source → pairs: each function cut into its signature, its docstring and its body.

    docstring            → signature and body      category docstring_to_implementation
    signature            → body                    category signature_to_body
    signature and body   → docstring               category implementation_to_docstring

Functions are taken from modules and classes, also under ``if`` and ``try``; a function inside a function
stays a part of it. Comments and formatting survive, since the text is cut and not printed anew. Methods are
moved to the margin, so a body set under its signature parses.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Sequence

import attrs

from mens_core.corpus.pair import CODE_LANE, DOCS_LANE, Ledger, Pair

__all__ = ["DocumentedFunction", "functions_of", "python_pairs"]

_IDLE_BODY = "function body that does nothing: pass, ... or raise NotImplementedError"

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
    """

    name: str
    line: int
    signature: str
    body: str
    docstring: str | None
    idle: bool


def python_pairs(text: str, source: str, dropped: Ledger) -> Iterator[Pair]:
    """The pairs of one Python file, in the order of its functions.

    Args:
        text: the file, with newlines as its only line ends.
        source: its name in the rows.
        dropped: where rows that cannot be made are booked.

    Raises:
        SyntaxError: if the text is not Python of the running version.
        ValueError: if it holds null bytes.
        RecursionError, MemoryError: if it is nested beyond what the parser bears.
    """
    for function in functions_of(text):
        place = f"{source}:{function.line}"
        if function.idle:
            dropped.add(_IDLE_BODY, place, count=1 if function.docstring is None else 3)
        else:
            yield from _pairs(function, place)


def _pairs(function: DocumentedFunction, place: str) -> Iterator[Pair]:
    whole = f"{function.signature}\n{function.body}"
    code = {"source": place, "lane": CODE_LANE, "response_mode": "code_only", "origin": whole}
    if function.docstring is not None:
        yield Pair(
            prompt=f"Write the Python function `{function.name}`, described here.\n\n{function.docstring}",
            response=whole,
            category="docstring_to_implementation",
            task_family="codegen",
            **code,
        )
    yield Pair(
        prompt=f"Write the body of the Python function `{function.name}`.\n\n{function.signature}",
        response=function.body,
        category="signature_to_body",
        task_family="completion",
        **code,
    )
    if function.docstring is not None:
        yield Pair(
            prompt=f"Write the docstring of the Python function `{function.name}`.\n\n{whole}",
            response=function.docstring,
            category="implementation_to_docstring",
            source=place,
            lane=DOCS_LANE,
            response_mode="prose_only",
            task_family="docs_qa",
            origin=whole,
        )


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
    inside_strings = _inside_strings(node, lines)

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


def _inside_strings(node: _Function, lines: Sequence[bytes]) -> set[int]:
    """Numbers of the lines that begin inside a string."""
    inside: set[int] = set()
    if not node.col_offset:
        return inside
    for part in ast.walk(node):
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
