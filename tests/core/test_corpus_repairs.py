"""Broken functions: each is wrong in one place, reads like the function it was, and is mended by that function."""

from __future__ import annotations

import ast
import sysconfig
import warnings
from collections import Counter
from pathlib import Path

import pytest

from mens_core.corpus.defects import DEFECTS, SPARED_FIELDS, SPARED_NODES, SYNTAX_DEFECT
from mens_core.corpus.mutations import mutate
from mens_core.corpus.pair import Ledger, Pair
from mens_core.corpus.python_functions import functions_of
from mens_core.corpus.python_pairs import Shares, python_pieces
from mens_core.corpus.syntax import walk

STDLIB = Path(sysconfig.get_path("stdlib"))
FUNCTIONS = [
    function.whole
    for part in ("argparse.py", "asyncio/locks.py", "asyncio/queues.py", "statistics.py", "heapq.py", "turtle.py")
    for function in functions_of((STDLIB / part).read_text("utf-8"))
    if not function.idle
]


def tree_of(code: str) -> str | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.dump(ast.parse(code))
    except SyntaxError:
        return None


@pytest.fixture(scope="module")
def mutations():
    found = [(code, mutate(code, seed, "test")) for code in FUNCTIONS for seed in range(3)]
    return [(code, mutation) for code, mutation in found if mutation is not None]


def test_most_functions_can_be_broken_and_every_kind_of_defect_occurs(mutations) -> None:
    assert len(mutations) > 0.8 * 3 * len(FUNCTIONS)
    assert set(Counter(mutation.defect for _, mutation in mutations)) == set(DEFECTS)


def test_a_mutation_changes_the_syntax_tree_and_parses_unless_its_defect_is_one_of_syntax(mutations) -> None:
    for code, mutation in mutations:
        tree = tree_of(mutation.code)
        assert (tree is None) == (mutation.defect == SYNTAX_DEFECT), mutation.code
        assert tree != tree_of(code), mutation.code


def test_a_mutation_changes_one_line_and_explains_it(mutations) -> None:
    for code, mutation in mutations:
        changed = [
            (wrong.strip(), right.strip())
            for wrong, right in zip(mutation.code.split("\n"), code.split("\n"), strict=True)
            if wrong != right
        ]
        assert len(changed) == 1
        wrong, right = changed[0]
        assert mutation.explanation.endswith(f"\n\n    {wrong}\n\nand has to be\n\n    {right}")


@pytest.mark.parametrize(
    ("defect", "code", "broken"),
    [
        ("negated_comparison", "def f(a, b):\n    return (a)  <  (b)  # why", "    return (a)  >=  (b)  # why"),
        ("negated_comparison", "def f(a):\n    return a  is   not None", "    return a  is None"),
        ("wrong_arithmetic", "def f(é):\n    return é + 2", "    return é - 2"),
        ("wrong_logic", "def f(a, b):\n    return a and b", "    return a or b"),
        ("swapped_arguments", "def f(a):\n    return isinstance(a, str)", "    return isinstance(str, a)"),
        ("off_by_one", "def f(a):\n    return a[-1]", "    return a[-2]"),
        ("off_by_one", "def f(a):\n    return list(range(3))", "    return list(range(4))"),
        ("dropped_return", "def f(a):\n    return (a)", "    (a)"),
        ("removed_await", "async def f(a):\n    await a()", "    a()"),
        ("undefined_name", "def f(value):\n    return value", "    return vaule"),
        ("unclosed_bracket", "def f(a):\n    g(a)", "    g(a"),
    ],
)
def test_each_defect_is_what_its_name_says(defect: str, code: str, broken: str) -> None:
    (edit,) = DEFECTS[defect].edits(walk(ast.parse(code), SPARED_FIELDS, SPARED_NODES), code.encode().split(b"\n"))
    line = code.encode().split(b"\n")[edit.line - 1]
    assert (line[: edit.start] + edit.new + line[edit.end :]).decode() == broken


@pytest.mark.parametrize(
    "code",
    [
        "def f(a, b): return max(a, b)",
        "def f(): return g(1, 0x1)",
        "def f(self): return self.x",
        'def f(value): return f"{value + 1}"',
        "def f(a: x[1]) -> x[2]: pass",
        "def f(a): return 5",
        "def f(a): return a % 2",
        "def f(a): yield a; return a",
    ],
)
def test_edits_that_would_do_no_harm_or_cannot_be_placed_are_not_made(code: str) -> None:
    nodes = walk(ast.parse(code), SPARED_FIELDS, SPARED_NODES)
    harmless = {"unclosed_bracket", "dropped_return"} if "self.x" in code or "% 2" in code else {"unclosed_bracket"}
    edits = {name for name, defect in DEFECTS.items() if list(defect.edits(nodes, [code.encode()]))}
    assert edits <= harmless | ({"dropped_return"} if "{" in code else set())


def test_another_seed_and_another_purpose_break_a_function_elsewhere() -> None:
    code = max(FUNCTIONS, key=len)
    assert len({mutate(code, seed, "test").code for seed in range(8)}) > 4
    assert len({mutate(code, 0, str(purpose)).code for purpose in range(8)}) > 4
    assert mutate(code, 0, "test") == mutate(code, 0, "test")


def test_nothing_to_break_gives_no_mutation() -> None:
    assert mutate("def f():\n    x = 1", 0, "test") is None


def pairs_of(text: str) -> list[Pair]:
    shares = Shares(negatives=1, multi_turn=1, seed=0, max_chars=10_000)
    return [pair for piece in python_pieces(text, "m.py", Ledger(), shares) for pair in piece.pairs]


def test_a_negative_row_asks_for_the_function_with_what_fails_and_the_broken_code() -> None:
    code = "def add(first, second):\n    return first + second"
    (negative,) = [pair for pair in pairs_of(code) if pair.category == "error_correction"]
    ((prompt, response),) = negative.exchanges
    assert response == code
    request, broken = prompt.split("\n\n", 1)
    assert request.startswith("Correct the Python function `add`. ")
    assert tree_of(broken) not in {None, tree_of(code)}
    assert (negative.rating, negative.response_mode) == (4, "code_only")


def test_conversations_end_with_the_docstring_or_with_the_reason_of_a_repair() -> None:
    template = 'def add{0}(first, second):\n    """Add {0}."""\n    return first + second + {0}\n'
    text = "\n".join(map(template.format, range(10, 40)))
    talks = [pair for pair in pairs_of(text) if pair.category == "multi_turn"]
    assert len(talks) == 30
    assert 5 < sum(talk.defect is None for talk in talks) < 25
    for talk in talks:
        (_, code), (ask, answer) = talk.exchanges
        if talk.defect is None:
            assert ask == "Now write its docstring."
            assert answer.startswith("Add ")
        else:
            assert ask == "What was wrong with it?"
            assert answer.split("\n\n")[-1].strip() in code
