"""Python functions → pieces: each part of a function asked for from the others, and some of it broken.

docstring            → signature and body      category docstring_to_implementation
signature            → body                    category signature_to_body
signature and body   → docstring               category implementation_to_docstring
broken function      → the function            category error_correction       a share of the functions
two of these in a conversation                 category multi_turn             a share of the functions
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import attrs

from mens_core.corpus.constructs import measure
from mens_core.corpus.mutations import Mutation, mutate
from mens_core.corpus.pair import DOCS_LANE, Ledger, Pair, Piece, draw
from mens_core.corpus.python_functions import DocumentedFunction, functions_of

__all__ = ["Shares", "pieces_of_functions", "python_pieces"]

_IDLE_BODY = "function body that does nothing: pass, ... or raise NotImplementedError"
_MENDED_RATING = 4


@attrs.frozen(kw_only=True)
class Shares:
    """How many functions get rows beyond the plain ones; which, depends on the seed and the function alone.

    Attributes:
        negatives: share of the functions that are also shown broken, from 0 to 1.
        multi_turn: share of the functions that are also talked about, from 0 to 1.
        seed: another seed takes other functions and breaks them elsewhere.
        max_chars: a function of more than half as many characters is not broken, since no row could hold it twice.
    """

    negatives: float
    multi_turn: float
    seed: int
    max_chars: int


def python_pieces(text: str, source: str, dropped: Ledger, shares: Shares) -> Iterator[Piece]:
    """The pieces of one Python file, one a function, in its order.

    Args:
        text: the file, with newlines as its only line ends.
        source: its name in the rows.
        dropped: where rows that cannot be made are booked.
        shares: how many rows are made beyond the plain ones.

    Raises:
        SyntaxError: if the text is not Python of the running version.
        ValueError: if it holds null bytes.
        RecursionError, MemoryError: if it is nested beyond what the parser bears.
    """
    return pieces_of_functions(functions_of(text), source, dropped, shares)


def pieces_of_functions(
    functions: Iterable[DocumentedFunction], source: str, dropped: Ledger, shares: Shares
) -> Iterator[Piece]:
    """As ``python_pieces``, of functions that have been cut."""
    for function in functions:
        place = f"{source}:{function.line}"
        if function.idle:
            dropped.add(_IDLE_BODY, place, count=1 if function.docstring is None else 3)
            continue
        measured = measure(function.nodes)
        yield Piece(
            source=place,
            text=f"{function.whole}\n{function.docstring or ''}",
            origin=function.whole,
            constructs=measured.constructs,
            difficulty=measured.difficulty,
            pairs=(*_plain(function), *_broken(function, shares), *_conversations(function, shares)),
        )


def _plain(function: DocumentedFunction) -> Iterator[Pair]:
    if function.docstring is not None:
        yield Pair(
            exchanges=((_ask_for_function(function), function.whole),),
            category="docstring_to_implementation",
            task_family="codegen",
        )
    yield Pair(
        exchanges=((_ask_for_body(function), function.body),),
        category="signature_to_body",
        task_family="completion",
    )
    if function.docstring is not None:
        asked = f"Write the docstring of the Python function `{function.name}`.\n\n{function.whole}"
        yield Pair(
            exchanges=((asked, function.docstring),),
            category="implementation_to_docstring",
            task_family="docs_qa",
            lane=DOCS_LANE,
            response_mode="prose_only",
        )


def _broken(function: DocumentedFunction, shares: Shares) -> Iterator[Pair]:
    if draw(shares.seed, "negative", function.whole) >= shares.negatives:
        return
    mutation = _mutation(function, shares, "negative")
    if mutation:
        yield Pair(
            exchanges=((_ask_for_repair(function, mutation), function.whole),),
            category="error_correction",
            task_family="repair",
            rating=_MENDED_RATING,
            defect=mutation.defect,
        )


def _conversations(function: DocumentedFunction, shares: Shares) -> Iterator[Pair]:
    """A function and then its docstring, or a repair and then the reason for it."""
    if draw(shares.seed, "conversation", function.whole) >= shares.multi_turn:
        return
    documented = function.docstring is not None and draw(shares.seed, "topic", function.whole) < 1 / 2
    mutation = None if documented else _mutation(function, shares, "conversation")
    if documented and function.docstring is not None:
        exchanges = (
            (_ask_for_body(function), function.body),
            ("Now write its docstring.", function.docstring),
        )
    elif mutation:
        exchanges = (
            (_ask_for_repair(function, mutation), function.whole),
            ("What was wrong with it?", mutation.explanation),
        )
    else:
        return
    yield Pair(
        exchanges=exchanges,
        category="multi_turn",
        task_family="conversation",
        lane=DOCS_LANE,
        response_mode=None,
        rating=_MENDED_RATING if mutation else 5,
        defect=mutation.defect if mutation else None,
    )


def _mutation(function: DocumentedFunction, shares: Shares, purpose: str) -> Mutation | None:
    fits = 2 * len(function.whole) <= shares.max_chars
    return mutate(function.whole, shares.seed, purpose) if fits else None


def _ask_for_function(function: DocumentedFunction) -> str:
    return f"Write the Python function `{function.name}`, described here.\n\n{function.docstring}"


def _ask_for_body(function: DocumentedFunction) -> str:
    return f"Write the body of the Python function `{function.name}`.\n\n{function.signature}"


def _ask_for_repair(function: DocumentedFunction, mutation: Mutation) -> str:
    return f"Correct the Python function `{function.name}`. {mutation.failure}\n\n{mutation.code}"
