"""Break a function on purpose, in one place, so that its repair can be learnt.

    code ─▶ every place of its syntax tree where an edit is known to do harm ─▶ one kind, one place, by hash ─▶ edit

The text is edited at the position of the tree, so comments and formatting survive. The edits are chosen so that
the result is wrong and not only different (an equivalent mutant: DeMillo, Lipton and Sayward, Computer 11(4), 1978):
a comparison is negated, which no input forgives, and not moved to its neighbour.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Sequence
from typing import TypeVar

import attrs

from mens_core.corpus.defects import DEFECTS, SLIPS, SPARED_FIELDS, SPARED_NODES, SYNTAX_DEFECT, Edit
from mens_core.corpus.pair import draw
from mens_core.corpus.syntax import walk

__all__ = ["Mutation", "mutate"]

_Item = TypeVar("_Item")


@attrs.frozen(kw_only=True)
class Mutation:
    """A function with one defect.

    Attributes:
        defect: a key of ``DEFECTS``.
        code: the function with the defect.
        failure: what it does wrong, as one who runs it would say.
        explanation: what was wrong with which line, and how the line has to be.
    """

    defect: str
    code: str
    failure: str
    explanation: str


def mutate(code: str, seed: int, purpose: str) -> Mutation | None:
    """Break a function.

    Args:
        code: one function, at the left margin, that parses.
        seed: another seed breaks another place.
        purpose: what the mutation is for; another purpose breaks another place, if there are several.

    Returns:
        The mutation, which depends on the arguments alone; None where no kind of defect applies, or the code is
        nested beyond what a walk bears. Its code has another syntax tree than the function, or none where the
        defect is an error of syntax.

    Raises:
        SyntaxError: if the code does not parse.
    """
    try:
        return _mutate(code, seed, purpose)
    except RecursionError:
        return None


def _mutate(code: str, seed: int, purpose: str) -> Mutation | None:
    # Column offsets of the syntax tree count UTF-8 bytes.
    tree, lines = ast.parse(code), code.encode().split(b"\n")
    nodes = walk(tree, SPARED_FIELDS, SPARED_NODES)
    by_defect = {name: list(defect.edits(nodes, lines)) for name, defect in DEFECTS.items()}
    for name in _order([name for name, edits in by_defect.items() if edits], seed, purpose, code):
        for edit in _turned(by_defect[name], draw(seed, purpose, "place", code)):
            broken = _apply(edit, lines)
            if _parses(broken) is not (name == SYNTAX_DEFECT):
                return _mutation(name, edit, lines, broken)
    return None


def _order(names: Sequence[str], seed: int, purpose: str, code: str) -> list[str]:
    """Kinds of defect as they are tried: errors of meaning first, in one function of four slips first."""
    start = draw(seed, purpose, "defect", code)
    slips = _turned([name for name in names if name in SLIPS], start)
    meaning = _turned([name for name in names if name not in SLIPS], start)
    return [*slips, *meaning] if draw(seed, purpose, "slip", code) < 1 / 4 else [*meaning, *slips]


def _turned(items: Sequence[_Item], start: float) -> list[_Item]:
    first = int(start * len(items))
    return [*items[first:], *items[:first]]


def _apply(edit: Edit, lines: Sequence[bytes]) -> str:
    line = lines[edit.line - 1]
    changed = line[: edit.start] + edit.new + line[edit.end :]
    return b"\n".join([*lines[: edit.line - 1], changed, *lines[edit.line :]]).decode()


def _parses(code: str) -> bool:
    try:
        with warnings.catch_warnings():
            # What the parser thinks of `1 is 2` and the like: broken code is the point of it.
            warnings.simplefilter("ignore")
            ast.parse(code)
    except SyntaxError:
        return False
    return True


def _mutation(name: str, edit: Edit, lines: Sequence[bytes], broken: str) -> Mutation:
    defect = DEFECTS[name]
    wrong, right = broken.split("\n")[edit.line - 1].strip(), lines[edit.line - 1].decode().strip()
    return Mutation(
        defect=name,
        code=broken,
        failure=defect.failure.format(new=edit.new.decode()),
        explanation=f"{defect.cause} Line {edit.line} was\n\n    {wrong}\n\nand has to be\n\n    {right}",
    )
