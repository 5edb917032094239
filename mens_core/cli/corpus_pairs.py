"""``corpus pairs``: prompt and response rows from source code and documents."""

from __future__ import annotations

import argparse
from pathlib import Path

import mens_core
from mens_core import report
from mens_core.corpus.pairs_defaults import EVAL_FRACTION, MAX_CHARS, MIN_CHARS, MULTI_TURN, NEGATIVES, SIMILARITY
from mens_core.corpus.sources import EXCLUDED_FOLDERS

__all__ = ["add_arguments", "run"]

_DESCRIPTION = """\
Cuts every Python function into signature, docstring and body, and asks for each from the others; breaks some of
them and asks for the repair; asks for the code blocks of Markdown files from the text around them, and the other way
round. Code that a tool has validated comes as JSON lines, {"code": ..., "source": ..., "constructs": [...]}: Python
is cut in the same way, other languages are asked for by their constructs. Every row tells its category, constructs,
difficulty from 1 to 10, rating and source. Writes three files:

  train.jsonl    the rows to train on, one JSON object a line
  eval.jsonl     rows held out by content; they share no prompt and no response with train.jsonl
  metadata.json  how many rows of which kind, and what was left out for which reason

Equal rows, and code nearly equal to earlier code, are left out and counted. The same sources and settings give the
same bytes."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``corpus pairs``."""
    parser.description = _DESCRIPTION
    parser.add_argument(
        "sources",
        nargs="+",
        type=Path,
        metavar="SOURCE",
        help="a folder, read with all .py, .md and .markdown files below it, or one such file, or a file of validated "
        "rows, .jsonl or .jsonl.gz",
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder for the three files; made if missing",
    )
    parser.add_argument(
        "--eval-fraction",
        type=float,
        default=EVAL_FRACTION,
        metavar="SHARE",
        help="share held out, from 0 to less than 1; 0 writes no eval.jsonl (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="another seed holds out other rows and breaks other functions (default: %(default)s)",
    )
    parser.add_argument(
        "--min-chars",
        type=int,
        default=MIN_CHARS,
        metavar="N",
        help="leave out responses shorter than this, in characters (default: %(default)s)",
    )
    parser.add_argument(
        "--max-chars",
        type=int,
        default=MAX_CHARS,
        metavar="N",
        help="leave out rows longer than this, in characters of prompt and response together; a token is "
        "3 to 4 characters of code in a usual vocabulary, one byte in the lab's (default: %(default)s)",
    )
    parser.add_argument(
        "--negatives",
        type=float,
        default=NEGATIVES,
        metavar="SHARE",
        help="share of the functions that are also shown with a defect, to be corrected; 0 for none, at most 1, for "
        "every function where a defect can be made (default: %(default)s)",
    )
    parser.add_argument(
        "--multi-turn",
        type=float,
        default=MULTI_TURN,
        metavar="SHARE",
        help="share of the functions that are also talked about: the code and then its docstring, or a repair and "
        "then its reason; 0 for none, at most 1 (default: %(default)s)",
    )
    parser.add_argument(
        "--near-duplicates",
        type=float,
        default=SIMILARITY,
        metavar="SHARE",
        help="leave out a function or block that has this share of its runs of five tokens in common with an earlier "
        "one, from 0.5 to 1, which only takes what has the same tokens (default: %(default)s)",
    )
    parser.add_argument(
        "--curriculum",
        action="store_true",
        help="order the rows from easy to difficult; without it they keep the order of the sources. train draws "
        "rows in an order of its own either way",
    )
    parser.add_argument(
        "--exclude",
        action="append",
        default=None,
        metavar="NAME",
        help="do not enter folders of this name, repeatable; added to "
        f"{', '.join(EXCLUDED_FOLDERS)}, hidden folders and virtual environments, which are never entered",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a corpus that --output already holds")


def run(arguments: argparse.Namespace) -> int:
    """Write the corpus and say what came of it; returns 0.

    Raises:
        DataError: as ``write_pairs`` does.
    """
    written = mens_core.write_pairs(
        arguments.sources,
        arguments.output,
        eval_fraction=arguments.eval_fraction,
        seed=arguments.seed,
        min_chars=arguments.min_chars,
        max_chars=arguments.max_chars,
        negatives=arguments.negatives,
        multi_turn=arguments.multi_turn,
        near_duplicates=arguments.near_duplicates,
        curriculum=arguments.curriculum,
        exclude=(*EXCLUDED_FOLDERS, *(arguments.exclude or ())),
        overwrite=arguments.overwrite,
    )
    report.say(written.text())
    return 0
