"""Cutting sources into pieces: what a function means survives it, and so does the text round a code block."""

from __future__ import annotations

import ast
import sys
import sysconfig
import textwrap
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mens_core.corpus.markdown_pairs import blocks_of
from mens_core.corpus.pair import Ledger
from mens_core.corpus.python_functions import functions_of
from mens_core.corpus.python_pairs import Shares, python_pieces

STDLIB = Path(sysconfig.get_path("stdlib"))
# Decorators, nested classes, multi-line strings, coroutines and non-ASCII comments.
LIBRARY_PARTS = [STDLIB / name for name in ("json", "asyncio", "importlib", "argparse.py", "typing.py", "turtle.py")]

SOURCE = '''\
import functools

class Outer:
    class Inner:
        @functools.wraps(
            len,
        )
        async def run(self, a: "x:y" = ":", *, b=lambda: {1: 2}) -> "dict[int:str]":  # a comment: here
            """Say é.

                indented
            """
            # the first comment
            text = """
        kept as it is
            """
            return (text +
                    "a"
                    "b")  # last

if True:
    def one_line(x): return x * 100000000
'''


def test_a_function_is_cut_into_signature_docstring_and_body() -> None:
    run, one_line = functions_of(SOURCE)
    assert (run.name, run.line, run.idle) == ("Outer.Inner.run", 5, False)
    assert run.docstring == "Say é.\n\nindented"
    signature = 'async def run(self, a: "x:y" = ":", *, b=lambda: {1: 2}) -> "dict[int:str]":'
    assert run.signature == f"@functools.wraps(\n    len,\n)\n{signature}"
    expected = (
        '    # the first comment\n    text = """\n        kept as it is\n            """\n'
        '    return (text +\n            "a"\n            "b")  # last'
    )
    assert run.body == expected
    assert (one_line.signature, one_line.body) == ("def one_line(x):", "    return x * 100000000")


def parsed(text: str) -> list[str]:
    """The functions of a module as syntax trees without docstrings and positions, in order."""
    found = []

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                child.body = child.body[ast.get_docstring(child) is not None :]
                found.append(ast.dump(child))
            else:
                visit(child)

    visit(ast.parse(text))
    return found


def assert_functions_survive(text: str) -> int:
    functions = list(functions_of(text))
    originals = parsed(text)
    assert len(functions) == len(originals)
    for function, original in zip(functions, originals, strict=True):
        if not function.idle:
            assert parsed(f"{function.signature}\n{function.body}") == [original], function.signature
    return len(functions)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="before 3.12 the parser refuses this")
def test_a_field_of_an_f_string_keeps_the_blanks_that_it_shows() -> None:
    assert assert_functions_survive("class C:\n    def f(self, x):\n        return f'{\n        x\n    =}'\n") == 1


identifiers = st.sampled_from(["a", "value", "λ", "_x1"])
literals = st.sampled_from(
    [
        "1",
        "'é: #'",
        '"""two\n    lines: #"""',
        "f'{a:>{b}}'",
        "(1,\n 2)",
        "lambda: {1: 2}",
        "b'x' \\\n  b'y'",
        "x[1:2]",
        "'one \\\n        two'",
    ]
)
signatures = st.builds(
    "({}{}){}:{}".format,
    identifiers,
    st.sampled_from(
        ["", ", *, k: 'a:b' = {1: 2}", ", # note: one\n   b=3", ", *rest, **more: int", ", k=3,  # the last: so far\n"]
    ),
    st.sampled_from(["", " -> dict[1:2]", " -> (  # why: this\n  int)"]),
    st.sampled_from(["", "  # trailing: comment"]),
)
docstrings = st.sampled_from(
    ["", "'one line'", '"""Many\n\n      lines."""', "r'''raw \\d'''  # note", "'a' 'b'; x = 1"]
)
statements = st.lists(st.builds("x = {}".format, literals) | st.just("# comment"), min_size=1, max_size=3)


@st.composite
def modules(draw: st.DrawFn) -> str:
    depth = draw(st.integers(0, 2))
    margin, blank = "    " * depth, draw(st.sampled_from(["", "\n"]))
    heads = "".join(f"{'    ' * level}class C{level}:\n" for level in range(depth))
    decorator = draw(st.sampled_from(["", f"{margin}@wraps(\n{margin}  1)\n", f"{margin}@plain\n"]))
    keyword = draw(st.sampled_from(["def", "async def"]))
    lines = [line for line in [draw(docstrings), *draw(statements), "return x"] if line]
    body = "".join(f"{margin}    {line}\n{blank}" for line in lines)
    return f"{heads}{decorator}{margin}{keyword} f{draw(signatures)}\n{body}"


@given(modules())
def test_signature_and_body_mean_what_the_function_meant(text: str) -> None:
    assert assert_functions_survive(text) == 1


def test_every_function_of_a_part_of_the_standard_library_survives_the_cut() -> None:
    files = [path for part in LIBRARY_PARTS for path in ([part] if part.is_file() else sorted(part.glob("*.py")))]
    assert sum(assert_functions_survive(path.read_text("utf-8")) for path in files) > 1000


def test_a_body_that_does_nothing_is_booked_and_gives_no_row() -> None:
    dropped = Ledger()
    text = 'def a(): ...\n\ndef b():\n    """Documented."""\n\ndef c():\n    raise NotImplementedError("no")\n'
    shares = Shares(negatives=1, multi_turn=1, seed=0, max_chars=900)
    assert list(python_pieces(text, "x.py", dropped, shares)) == []
    (tally,) = dropped.tallies().values()
    assert (tally.count, tally.examples) == (5, ("x.py:1", "x.py:3", "x.py:6"))


def test_code_blocks_come_with_the_text_around_them() -> None:
    text = textwrap.dedent("""\
        ---
        title: x
        ---
        # Top

        ## Inner ##
        Before `it`.

        ````Python extra
        a = 1
        ```
        still code
        ````
        Between.

        ~~~
        b
        ~~~
        After.
        # Next
        - item

          ```sh
          ls
            -l
          ```
        ```open
        never closed
        """)
    first, second, third, fourth = blocks_of(text)
    assert (first.line, first.language, first.code) == (9, "python", "a = 1\n```\nstill code")
    assert (first.headings, first.above, first.below) == (("Top", "Inner"), "Before `it`.", "Between.")
    assert (second.language, second.code, second.above, second.below) == ("", "b", "Between.", "After.")
    assert (third.headings, third.code, third.above, third.below) == (("Next",), "ls\n  -l", "- item", "")
    assert (fourth.closed, fourth.line) == (False, 27)
