"""What the machine does to a run, told so that one knows what to change: no room, no memory."""

from __future__ import annotations

import errno

from mens_core.errors import MensError, TrainingError

__all__ = ["explained"]

# The frameworks' own classes and words, by name, since none of them is imported here.
_MEMORY_CLASSES = {"MemoryError", "OutOfMemoryError"}
_MEMORY_WORDS = ("RESOURCE_EXHAUSTED", "Out of memory", "out of memory", "can't allocate memory", "not enough memory")
_MEND = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "allow it"),
}
_GO_ON = "go on from the last checkpoint with --resume auto"


def explained(error: BaseException) -> MensError | None:
    """The error in this project's words; None if it is none of these."""
    if isinstance(error, MensError):
        return None
    if _is_out_of_memory(error):
        return TrainingError(
            f"there is not enough memory: {_first_line(error)}",
            fix="halve --batch-size and double --grad-accum, which trains the same steps and may be resumed with "
            "--resume auto --resume-anyway; or shorten --seq-len; or --backend qlora",
        )
    if not isinstance(error, OSError):
        return None
    if error.errno == errno.ENOENT:
        return TrainingError("a file or folder of the run has gone while it went on", where=error.filename, fix=_GO_ON)
    mend = _MEND.get(error.errno or 0)
    return TrainingError(
        f"the system refused the run something: {error.strerror or error}",
        where=error.filename,
        fix=f"{mend}, then {_GO_ON}" if mend else _GO_ON,
    )


def _is_out_of_memory(error: BaseException) -> bool:
    if any(kind.__name__ in _MEMORY_CLASSES for kind in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _MEMORY_WORDS)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
