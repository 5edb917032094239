"""Every error this project raises on purpose.

    MensError                     base: catch this to catch them all
    ├── ContractError             a field of the contract is wrong (all problems are listed together)
    ├── DataError                 a corpus, a row or a source file cannot be used
    ├── ModelError                a model folder, config.json, tokenizer or weight file cannot be used
    ├── GateError                 the planner refuses the run
    ├── RunDirectoryError         the output folder cannot be used
    ├── ResumeError               a checkpoint is damaged, or is not of this run
    ├── TrainingError             the run started and had to be stopped
    ├── RunInterrupted            the run was asked to stop; it can go on
    └── PluginError               a backend or plugin cannot be used
        ├── UnknownBackendError       no installed distribution offers that name
        ├── AmbiguousBackendError     two distributions claim one name
        ├── BrokenBackendError        the backend cannot be imported
        └── HookContractError         a hook is misspelt, has wrong arguments, or answered something wrong

A message says what happened, where, what was expected and what to do now, each on its own line.
"""

from __future__ import annotations

import re
from pathlib import Path

__all__ = [
    "AmbiguousBackendError",
    "BrokenBackendError",
    "ContractError",
    "DataError",
    "GateError",
    "HookContractError",
    "MensError",
    "ModelError",
    "PluginError",
    "ResumeError",
    "RunDirectoryError",
    "RunInterrupted",
    "TrainingError",
    "UnknownBackendError",
    "harmless",
    "printable",
]

# Controls of a terminal, halves of surrogate pairs, line and paragraph separators, and marks that turn the direction.
_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, *, keep: str = "") -> str:
    """The text with every character that would steer a terminal or cannot be encoded written as its escape.

    Names come from files that others wrote: a line feed in one could forge a line of the message.
    """
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def harmless(text: str) -> str:
    """The text with what would steer a terminal written as its escape, and every other character as it is.

    Unlike ``printable`` it leaves blanks and joiners of every script alone: it is for whole texts, which people read.
    """
    return _STEERING.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class MensError(Exception):
    """Base of the tree; its text is built from up to four parts.

    Args:
        what: what happened, one sentence without a final full stop.
        where: the file, row, key or shape concerned.
        expected: what would have been accepted.
        fix: the one command or change that mends it.
    """

    def __init__(self, what: str, *, where: object = None, expected: str | None = None, fix: str | None = None) -> None:
        self.what, self.where, self.expected, self.fix = printable(what, keep="\n\t"), where, expected, fix
        parts = [self.what]
        parts += [f"  where: {printable(str(where))}"] if where is not None else []
        parts += [printable(f"  expected: {expected}", keep="\n\t")] if expected else []
        parts += [printable(f"  to mend it: {fix}", keep="\n\t")] if fix else []
        super().__init__("\n".join(parts))


class ContractError(MensError):
    """A field of the contract is unknown, out of range or contradicts another one."""


class DataError(MensError):
    """A corpus, a row or a source file is missing, empty or malformed."""


class ModelError(MensError):
    """A model folder, its config.json, its tokenizer or a weight file is missing or malformed."""


class GateError(MensError):
    """The planner found that the run cannot work and refused before anything was spent.

    Attributes:
        codes: of the gates that did not pass, in order; empty where no backend can do the run.
    """

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        expected: str | None = None,
        fix: str | None = None,
        codes: tuple[str, ...] = (),
    ) -> None:
        super().__init__(what, where=where, expected=expected, fix=fix)
        self.codes = codes


class RunDirectoryError(MensError):
    """The output folder is locked by another run, or already holds one."""


class TrainingError(MensError):
    """The run started and was stopped, for example by a loss that is not finite."""


class ResumeError(MensError):
    """A checkpoint is damaged, or differs from the run that is asked for in what cannot differ."""


class RunInterrupted(MensError):  # noqa: N818 (it is no failure: what was asked for has been done)
    """The run was asked to stop, has finished its step and saved a checkpoint.

    Attributes:
        reason: what ``stop`` said, such as SIGTERM, or ``max_time``.
        step: optimizer steps that have been taken.
        checkpoint: the folder that it goes on from.
    """

    def __init__(self, reason: str, *, step: int, checkpoint: Path) -> None:
        super().__init__(f"stopped by {reason} after step {step}", where=checkpoint, fix="go on with --resume auto")
        self.reason, self.step, self.checkpoint = reason, step, checkpoint


class PluginError(MensError):
    """A backend or plugin cannot be used; the four subclasses say why."""


class UnknownBackendError(PluginError):
    """No installed distribution offers a backend of that name."""


class AmbiguousBackendError(PluginError):
    """Two installed distributions offer a backend under the same name."""


class BrokenBackendError(PluginError):
    """The backend is installed but cannot be imported; the original error is chained."""


class HookContractError(PluginError):
    """A hook implementation breaks the contract written in ``mens_core.hookspecs``."""
