"""``init-model``: a small model folder with random weights and a tokenizer trained on given text."""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path

import mens_core
from mens_core import report
from mens_core.hf.layout import GRAPHS

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``init-model``."""
    parser.add_argument("--arch", required=True, metavar="|".join(GRAPHS), help="architecture")
    parser.add_argument(
        "--size",
        default="tiny",
        choices=("tiny", "small"),
        help="tiny is 64 wide and 2 deep, small 256 and 6 (default tiny)",
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder to make")
    parser.add_argument(
        "--text",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="UTF-8 files the tokenizer is trained on (default: this interpreter's standard library)",
    )
    parser.add_argument("--vocab-size", type=int, default=512, metavar="N", help="most tokens (default 512)")
    parser.add_argument("--seed", type=int, default=42, metavar="N", help="seed of the weights (default 42)")


def run(arguments: argparse.Namespace) -> int:
    """Write the folder."""
    text = arguments.text or sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    mens_core.write_random_model(
        arguments.output,
        arch=arguments.arch,
        size=arguments.size,
        text=text,
        vocab_size=arguments.vocab_size,
        seed=arguments.seed,
    )
    report.say(f"wrote a randomly initialised {arguments.size} {arguments.arch} model to {arguments.output}")
    return 0
