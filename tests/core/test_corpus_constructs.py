"""Constructs and difficulty are read from the syntax tree, not from the text."""

from __future__ import annotations

import ast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mens_core.corpus.constructs import PHRASES, Measure, difficulty_of_text, measure
from mens_core.corpus.syntax import walk


def measured(code: str) -> Measure:
    """Of the first function of a text."""
    return measure(walk(ast.parse(code).body[0]))


@pytest.mark.parametrize(
    ("code", "constructs"),
    [
        ("def f(): return 'for x in y: with z'", ()),
        ("def f(n): return f(n - 1)", ("recursion",)),
        ("def f(self): return other.f()", ()),
        ("def f(self): return self.f()", ("recursion",)),
        ("def f():\n    def g(): return f2()\n    return g", ("closure",)),
        ("def f():\n    def g(): return g()\n    return g", ("closure", "recursion")),
        ("@d\ndef f(): pass", ("decorator",)),
        ("def f(x: int): pass", ("annotations",)),
        ("def f() -> int: pass", ("annotations",)),
        ("async def f():\n    async with x: await y", ("async", "context_manager")),
        ("async def f(): return [x async for x in y]", ("async", "comprehension")),
        ("def f():\n    try: yield 1\n    except E: raise", ("exception_handling", "generator", "raise")),
        ("def f(x):\n    match x:\n        case [*_]: pass", ("match",)),
        ("def f(x): return x[1:], *x, lambda: f'{x}'", ("f_string", "lambda", "slicing", "unpacking")),
        ("def f():\n    global x\n    while (x := 1): assert x", ("assertion", "loop", "outer_variable", "walrus")),
    ],
)
def test_constructs_are_those_of_the_tree(code: str, constructs: tuple[str, ...]) -> None:
    assert measured(code).constructs == constructs
    assert set(constructs) <= set(PHRASES)


@pytest.mark.parametrize(
    ("code", "complexity", "nesting", "statements"),
    [
        ("def f(): return 1", 1, 0, 1),
        ("def f(x):\n    if x and x or x: return 1", 4, 1, 2),
        ("def f(x):\n    if x: a\n    elif x: b\n    elif x: c\n    else: d", 4, 1, 7),
        ("def f(x):\n    for a in x:\n        while a:\n            b", 3, 2, 3),
        ("def f(x): return [a for b in x for a in b if a if b]", 5, 0, 1),
        ("def f(x):\n    try: a\n    except E: b\n    finally: c", 2, 1, 4),
        ("def f(x):\n    match x:\n        case 1: a\n        case 2: b", 3, 1, 3),
    ],
)
def test_complexity_nesting_and_statements_are_counted(
    code: str, complexity: int, nesting: int, statements: int
) -> None:
    found = measured(code)
    assert (found.complexity, found.nesting, found.statements) == (complexity, nesting, statements)


@given(st.integers(1, 500), st.integers(1, 200), st.integers(0, 15), st.integers(0, 20))
def test_difficulty_stays_on_its_scale_and_grows_with_each_part(
    statements: int, complexity: int, nesting: int, constructs: int
) -> None:
    def difficulty(*parts: int) -> int:
        names = tuple(map(str, range(parts[3])))
        return Measure(constructs=names, statements=parts[0], complexity=parts[1], nesting=parts[2]).difficulty

    parts = [statements, complexity, nesting, constructs]
    assert 1 <= difficulty(*parts) <= 10
    for at in range(4):
        assert difficulty(*parts[:at], parts[at] * 2 + 1, *parts[at + 1 :]) >= difficulty(*parts)


def test_the_scale_has_both_its_ends() -> None:
    easy = Measure(constructs=(), statements=1, complexity=1, nesting=0)
    hard = Measure(constructs=("a",) * 8, statements=64, complexity=16, nesting=5)
    assert (easy.difficulty, hard.difficulty) == (1, 10)
    assert (difficulty_of_text("x"), difficulty_of_text("x\n\n" * 16), difficulty_of_text("x\n" * 5000)) == (1, 4, 10)


@given(st.sampled_from(["a = b + c", "def f(x=1, *y): return x[1:2] if x else -x", "class A(B, k=1): x: int = 1"]))
def test_the_walk_meets_every_node_but_operators_and_contexts(code: str) -> None:
    tree = ast.parse(code)
    left_out = (ast.expr_context, ast.operator, ast.unaryop, ast.boolop, ast.cmpop)
    expected = {id(node) for node in ast.walk(tree) if not isinstance(node, left_out)}
    assert {id(node) for node in walk(tree)} == expected
