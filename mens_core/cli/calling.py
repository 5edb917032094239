"""What follows once the words are read, a verb that runs or a complaint; the list of verbs needs neither."""

from __future__ import annotations

import argparse
import difflib
import signal
from collections.abc import Sequence

from mens_core import report
from mens_core.cli.signals import EXIT_CODES, raise_at_once
from mens_core.errors import MensError

__all__ = ["call", "complain_of", "nearest_flag"]


def call(arguments: argparse.Namespace) -> int:
    """Run the verb that was called; its exit code, see ``mens_core.cli.main``."""
    former = signal.signal(signal.SIGTERM, raise_at_once)
    try:
        return int(arguments.run(arguments))
    except KeyboardInterrupt as interrupt:
        report.complain("interrupted")
        # Without a name it is Python's own, for SIGINT.
        return EXIT_CODES.get(str(interrupt), EXIT_CODES["SIGINT"])
    except MensError as error:
        if arguments.debug:
            raise
        report.complain(f"error: {error}")
        return 2
    finally:
        signal.signal(signal.SIGTERM, former)


def complain_of(message: str, prog: str) -> None:
    """Say that words were not understood, and where it is said how they are."""
    report.complain(f"error: {message}\n  to mend it: {prog} --help")


def nearest_flag(unknown: Sequence[str], known: Sequence[str]) -> str | None:
    """The flag that is most like one of the words, if there is any."""
    close = [flag for word in unknown for flag in difflib.get_close_matches(word.partition("=")[0], known, n=1)]
    return close[0] if close else None
