"""Which constructs a piece of Python uses, and how difficult it is."""

from __future__ import annotations

import ast
import math
from collections import Counter
from collections.abc import Mapping, Sequence

import attrs

from mens_core.corpus.syntax import walk

__all__ = ["PHRASES", "Measure", "difficulty_of_text", "measure"]

#: Construct → what it is called in a sentence.
PHRASES = {
    "annotations": "type annotations",
    "assertion": "an assertion",
    "async": "asynchronous code",
    "class": "a class",
    "closure": "a function inside a function",
    "comprehension": "a comprehension",
    "conditional": "a conditional",
    "context_manager": "a context manager",
    "decorator": "a decorator",
    "exception_handling": "exception handling",
    "f_string": "an f-string",
    "function": "a function",
    "generator": "a generator",
    "lambda": "a lambda expression",
    "loop": "a loop",
    "match": "pattern matching",
    "outer_variable": "an assignment to an outer variable",
    "raise": "an exception that is raised",
    "recursion": "recursion",
    "slicing": "slices",
    "unpacking": "unpacking",
    "walrus": "an assignment expression",
}

_CONSTRUCTS: dict[type[ast.AST], str] = {
    ast.Assert: "assertion",
    ast.AnnAssign: "annotations",
    ast.AsyncFor: "loop",
    ast.AsyncWith: "context_manager",
    ast.ClassDef: "class",
    ast.DictComp: "comprehension",
    ast.For: "loop",
    ast.GeneratorExp: "comprehension",
    ast.Global: "outer_variable",
    ast.If: "conditional",
    ast.IfExp: "conditional",
    ast.JoinedStr: "f_string",
    ast.Lambda: "lambda",
    ast.ListComp: "comprehension",
    ast.Match: "match",
    ast.NamedExpr: "walrus",
    ast.Nonlocal: "outer_variable",
    ast.Raise: "raise",
    ast.SetComp: "comprehension",
    ast.Slice: "slicing",
    ast.Starred: "unpacking",
    ast.Try: "exception_handling",
    ast.TryStar: "exception_handling",
    ast.While: "loop",
    ast.With: "context_manager",
    ast.Yield: "generator",
    ast.YieldFrom: "generator",
}
_ASYNC = {ast.AsyncFunctionDef, ast.Await, ast.AsyncFor, ast.AsyncWith}
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_DECISIONS = (ast.If, ast.IfExp, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.match_case, ast.comprehension)
_TELLING = {*_FUNCTIONS, ast.ClassDef, ast.arg, ast.comprehension}
_BLOCKS = ("body", "orelse", "finalbody")
# Other statements have nothing below them that nests.
_COMPOUND = {ast.For, ast.AsyncFor, ast.While, ast.If, ast.Try, ast.TryStar, ast.With, ast.AsyncWith, ast.Match}
_COMPOUND |= {*_FUNCTIONS, ast.ClassDef, ast.Module, ast.ExceptHandler, ast.match_case}


@attrs.frozen(kw_only=True)
class Measure:
    """What is counted in a syntax tree.

    Attributes:
        constructs: names from ``PHRASES``, each once, in alphabetical order.
        statements: number of statements, those inside others too.
        nesting: how many blocks of control flow or inner functions stand round the innermost statement.
        complexity: McCabe's cyclomatic complexity, decisions + 1 (IEEE TSE SE-2(4), 1976). An operand of
            ``and`` or ``or`` beyond the first, and each ``for`` and ``if`` of a comprehension, are decisions.
    """

    constructs: tuple[str, ...]
    statements: int
    nesting: int
    complexity: int

    @property
    def difficulty(self) -> int:
        """From 1, a single statement, to 10.

        log2(statements) + log2(complexity) / 2 + nesting / 2 + constructs / 4, rounded and kept in 1 to 10: a
        function twice as long is one step harder, and so is one of four times the complexity, one nested two
        deeper, or one with four more kinds of construct. The weights spread the standard library over the scale.
        """
        size = math.log2(max(1, self.statements)) + math.log2(self.complexity) / 2
        return _on_scale(size + self.nesting / 2 + len(self.constructs) / 4)


def difficulty_of_text(text: str) -> int:
    """Difficulty of what has no syntax tree here: log2 of its lines that are not blank, from 1 to 10."""
    return _on_scale(math.log2(max(1, sum(bool(line.strip()) for line in text.split("\n")))))


def _on_scale(value: float) -> int:
    return min(10, max(1, round(value)))


def measure(nodes: Sequence[ast.AST]) -> Measure:
    """Count in the nodes of a function, which is not a statement of its own, or of a module.

    Args:
        nodes: from ``walk``; the first is the root.
    """
    kinds = Counter(map(type, nodes))
    decisions = sum(kinds[kind] for kind in _DECISIONS)
    if kinds[ast.BoolOp]:
        decisions += sum(len(node.values) - 1 for node in nodes if isinstance(node, ast.BoolOp))
    if kinds[ast.comprehension]:
        decisions += sum(len(node.ifs) for node in nodes if isinstance(node, ast.comprehension))
    statements = sum(count for kind, count in kinds.items() if issubclass(kind, ast.stmt))
    return Measure(
        constructs=tuple(sorted(_constructs(nodes, kinds))),
        statements=statements - isinstance(nodes[0], ast.stmt),
        nesting=_nesting(nodes[0]),
        complexity=1 + decisions,
    )


def _constructs(nodes: Sequence[ast.AST], kinds: Mapping[type[ast.AST], int]) -> set[str]:
    found = {_CONSTRUCTS[kind] for kind in kinds if kind in _CONSTRUCTS}
    if not _ASYNC.isdisjoint(kinds):
        found.add("async")
    # Few nodes are of these kinds, and matching each of them against every pattern took most of the time.
    for node in [node for node in nodes if type(node) in _TELLING]:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                found |= _constructs_of(node, nodes if node is nodes[0] else walk(node))
            case ast.ClassDef(decorator_list=[_, *_]):
                found.add("decorator")
            case ast.arg(annotation=ast.expr()):
                found.add("annotations")
            case ast.comprehension(is_async=1):
                found.add("async")
    return found


def _constructs_of(function: ast.FunctionDef | ast.AsyncFunctionDef, nodes: Sequence[ast.AST]) -> set[str]:
    found = {"annotations"} if function.returns else set()
    found |= {"decorator"} if function.decorator_list else set()
    for node in nodes:
        if isinstance(node, ast.Call) and _calls(node, function.name):
            found.add("recursion")
        elif isinstance(node, _FUNCTIONS) and node is not function:
            found.add("closure")
    return found


def _calls(call: ast.Call, name: str) -> bool:
    match call.func:
        case ast.Name(id=called) | ast.Attribute(value=ast.Name(id="self" | "cls"), attr=called):
            return called == name
    return False


def _nesting(tree: ast.AST) -> int:
    deepest, waiting = 0, [(tree, -1)]
    while waiting:
        node, depth = waiting.pop()
        deepest = max(deepest, depth)
        if type(node) not in _COMPOUND:
            continue
        waiting += [(arm, depth) for arm in (*getattr(node, "handlers", ()), *getattr(node, "cases", ()))]
        for field in _BLOCKS:
            block = getattr(node, field, ())
            # An elif is an if alone in an else, but nobody reads it as deeper.
            is_elif = field == "orelse" and isinstance(node, ast.If) and [*map(type, block)] == [ast.If]
            waiting += [(statement, depth + (not is_elif)) for statement in block]
    return deepest
