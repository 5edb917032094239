"""Markdown → pieces: each fenced code block with the text around it.

    headings and the text above  → code                       category documentation_to_example
    code                         → the text above and below   category example_to_documentation

Text is "around" a block when no heading and no other block stands between. Fences follow CommonMark 0.31,
section 4.5: three or more backticks or tildes, closed by as many of the same kind.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence

import attrs

from mens_core.corpus.constructs import Measure, difficulty_of_text, measure
from mens_core.corpus.pair import DOCS_LANE, Ledger, Pair, Piece
from mens_core.corpus.syntax import walk

__all__ = ["CodeBlock", "blocks_of", "markdown_pieces"]

_NO_TEXT = "code block with neither text nor heading above it"
_NO_CODE = "code block without code"
_UNCLOSED = "code block that is never closed"

_PYTHON = {"py", "python", "python3"}
_RATING = 4

_FENCE = re.compile(r"^(?P<indent>[ \t]*)(?P<fence>`{3,}|~{3,})[ \t]*(?P<info>.*)$")
_HEADING = re.compile(r"^ {0,3}(?P<level>#{1,6})[ \t]+(?P<title>.*?)(?:[ \t]+#+)?[ \t]*$")
_FRONT_MATTER = re.compile(r"\A---\n.*?\n(?:---|\.\.\.)\n", re.DOTALL)


@attrs.frozen(kw_only=True)
class CodeBlock:
    """A fenced block and its surroundings.

    Attributes:
        line: of the opening fence, from 1.
        language: the first word after the fence, in lower case; empty without one.
        code: the lines between the fences, without the fence's own indentation.
        headings: titles over the block, from the outermost to the nearest.
        above: text between the block and what stands before it; may be empty.
        below: text between the block and what follows it; may be empty.
        closed: whether the fence was closed before the end of the file.
    """

    line: int
    language: str
    code: str
    headings: tuple[str, ...]
    above: str
    below: str
    closed: bool


def markdown_pieces(text: str, source: str, dropped: Ledger) -> Iterator[Piece]:
    """The pieces of one Markdown file, one a code block, in its order.

    Args:
        text: the file, with newlines as its only line ends.
        source: its name in the rows.
        dropped: where rows that cannot be made are booked.
    """
    for block in blocks_of(text):
        place, reason = f"{source}:{block.line}", _why_not(block)
        if reason is not None:
            dropped.add(reason, place)
            continue
        measured = _measure(block)
        title = " / ".join(block.headings)
        yield Piece(
            source=place,
            text=f"{block.above}\n{block.code}\n{block.below}",
            # Blocks of one section quote each other's text, so the section decides where all of them go.
            origin=f"{source}\n{title}",
            constructs=measured.constructs if measured else (),
            difficulty=measured.difficulty if measured else difficulty_of_text(block.code),
            pairs=tuple(_pairs(block, title)),
        )


def _why_not(block: CodeBlock) -> str | None:
    if not block.closed:
        return _UNCLOSED
    if not block.code.strip():
        return _NO_CODE
    return None if block.headings or block.above else _NO_TEXT


def _measure(block: CodeBlock) -> Measure | None:
    if block.language not in _PYTHON:
        return None
    try:
        return measure(walk(ast.parse(block.code)))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        # Examples leave things out, and a sketch of Python is an example all the same.
        return None


def _pairs(block: CodeBlock, title: str) -> Iterator[Pair]:
    kind = f"{block.language} example" if block.language else "example"
    described = "\n\n".join(part for part in (title, block.above) if part)
    yield Pair(
        exchanges=((f"Write the {kind} that belongs to this text.\n\n{described}", block.code),),
        category="documentation_to_example",
        task_family="docs_qa",
        lane=DOCS_LANE,
        rating=_RATING,
    )
    explained = "\n\n".join(part for part in (block.above, block.below) if part)
    if explained:
        yield Pair(
            exchanges=((f"Explain this {kind}.\n\n{block.code}", explained),),
            category="example_to_documentation",
            task_family="docs_qa",
            lane=DOCS_LANE,
            response_mode="prose_only",
            rating=_RATING,
        )


def blocks_of(text: str) -> list[CodeBlock]:
    """Every fenced block of a Markdown text, in its order."""
    front_matter = _FRONT_MATTER.match(text)
    # Blank lines in its place keep the line numbers right.
    lines = text.split("\n")
    for number in range(front_matter.group().count("\n") if front_matter else 0):
        lines[number] = ""
    return _Reader(lines).blocks


class _Reader:
    """Reads line by line; ``blocks`` is complete once it is built."""

    def __init__(self, lines: Sequence[str]) -> None:
        self.blocks: list[CodeBlock] = []
        self._titles: list[tuple[int, str]] = []
        self._text: list[str] = []
        #: Whether the text being read stands right under the latest block.
        self._under_block = False
        number = 0
        while number < len(lines):
            fence = _FENCE.match(lines[number])
            # An info string with a backtick makes it inline code (CommonMark, example 145).
            if fence and not (fence["fence"][0] == "`" and "`" in fence["info"]):
                number = self._block(lines, number, fence)
            else:
                self._line(lines[number])
                number += 1
        self._close_text()

    def _line(self, line: str) -> None:
        heading = _HEADING.match(line)
        if heading is None:
            self._text.append(line)
            return
        self._close_text()
        self._under_block = False
        level = len(heading["level"])
        self._titles = [*(known for known in self._titles if known[0] < level), (level, heading["title"])]

    def _block(self, lines: Sequence[str], start: int, fence: re.Match[str]) -> int:
        closing = re.compile(rf"^[ \t]*{fence['fence'][0]}{{{len(fence['fence'])},}}[ \t]*$")
        end = next((number for number in range(start + 1, len(lines)) if closing.match(lines[number])), None)
        indent = fence["indent"]
        code = [line.removeprefix(indent) for line in lines[start + 1 : end]]
        info = fence["info"].split()
        block = CodeBlock(
            line=start + 1,
            language=info[0].strip("{}.").lower() if info else "",
            code="\n".join(code).strip("\n"),
            headings=tuple(title for _, title in self._titles if title),
            above=self._close_text(),
            below="",
            closed=end is not None,
        )
        self.blocks.append(block)
        self._under_block = True
        return len(lines) if end is None else end + 1

    def _close_text(self) -> str:
        text, self._text = "\n".join(self._text).strip(), []
        if self._under_block and self.blocks:
            self.blocks[-1] = attrs.evolve(self.blocks[-1], below=text)
        return text
