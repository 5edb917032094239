"""A run looked at from outside, while it goes on or after it ended, in whatever way.

Its manifest says how far it has come, its telemetry what it has done, and the process that holds the folder whether
there is still somebody at work. Nothing in the folder is written or locked.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mens_core.artifacts.rundir import HOLDER, MANIFEST, begun
from mens_core.errors import ModelError
from mens_core.hf.files import find_file, read_json, regular_size
from mens_core.training.telemetry_log import TelemetryTail, read_telemetry

__all__ = ["ENDED", "follow_run", "run_state", "run_status"]

#: States that a run does not leave by itself. ``died`` is no status of a manifest: it says running, nobody runs.
ENDED = frozenset({"complete", "failed", "interrupted", "died"})

_UNDER_WAY = frozenset({"planned", "running"})
_RECENT = 20
_LONGEST_HOLDER = 1000
# As RunDirectory.claim writes it.
_CLAIM = re.compile(r"process ([0-9]{1,9}) on ([^\s,]+)(?:, begun at ([0-9]{1,20}))?")


def run_status(folder: str | Path) -> dict[str, Any]:
    """Say how a run stands.

    Args:
        folder: of the run.

    Returns:
        ``run``; ``state``: ``starting``, ``planned``, ``running``, ``complete``, ``failed``, ``interrupted`` or
        ``died``; ``detail`` and ``advice``, for people; payloads of the telemetry, null where there is none yet:
        ``start``, ``last_step``, ``checkpoint``; ``losses`` of the last steps, ``evaluations``, the manifest's
        ``guards``, and ``notes``.

    Raises:
        ModelError: if the folder holds no run, or its manifest cannot be read.
        DataError: if its telemetry cannot be read.
    """
    folder = Path(folder)
    state, detail = run_state(folder)
    log = read_telemetry(folder)
    steps = log.payloads("step")
    start, checkpoint = log.last("train_start"), log.last("checkpoint_saved")
    return {
        "run": str(folder),
        "state": state,
        "detail": detail,
        "start": start,
        # Without its start, what a step says has nothing to stand beside.
        "last_step": steps[-1] if steps and start else None,
        "losses": [step["loss"] for step in steps[-_RECENT:]],
        "evaluations": log.payloads("evaluation"),
        "checkpoint": checkpoint,
        "guards": _guards(folder),
        "notes": ["the telemetry ends in half a line, which is left out"] if log.torn and state in ENDED else [],
        "advice": _advice(state, checkpoint),
    }


def run_state(folder: Path) -> tuple[str, str]:
    """The state of a run, and what there is to say of it.

    Raises:
        ModelError: if the folder holds no run, or its manifest cannot be read.
    """
    record = find_file(folder, MANIFEST) if folder.is_dir() else None
    process, host, since = _holder(folder)
    if record is None:
        if process is None:
            raise ModelError(f"there is no {MANIFEST}", where=folder, expected="the folder of a run")
        return ("starting", f"process {process}") if _is_alive(process, host, since) else ("died", _gone(process))
    manifest = read_json(record, expected="the manifest of a run")
    status, own = (manifest.get(key) for key in ("status", "pid")) if isinstance(manifest, dict) else (None, None)
    if not isinstance(status, str) or status not in _UNDER_WAY | ENDED - {"died"}:
        raise ModelError("the run's manifest has no status", where=record, expected="the manifest of a run")
    if status not in _UNDER_WAY:
        error = manifest.get("error")
        return status, error.splitlines()[0] if isinstance(error, str) and error else ""
    if process is None and type(own) is int:
        process = own
    if process is None or not _is_alive(process, host, since):
        return "died", f"the manifest says {status}, but {_gone(process)}"
    elsewhere = f" on {host}, which cannot be asked from here" if host not in {None, socket.gethostname()} else ""
    return status, f"process {process}{elsewhere}"


def follow_run(folder: str | Path, *, every: float = 0.5) -> Iterator[dict[str, Any]]:
    """Yield the events of a run, those that were there and those that come, until it has ended.

    A run that has not made its folder yet is waited for.

    Args:
        folder: of the run.
        every: seconds between two looks.

    Raises:
        ModelError, DataError: as ``run_status`` does, but for a folder without a run.
    """
    folder = Path(folder)
    tail = TelemetryTail(folder)
    while True:
        # Its state first: what it wrote before it ended is then there to be read.
        ended = _is_there(folder) and run_state(folder)[0] in ENDED
        yield from tail.read() if folder.is_dir() else ()
        if ended:
            return
        time.sleep(every)


def _guards(folder: Path) -> list[dict[str, Any]]:
    """The verdicts that the manifest holds; what is none is left out."""
    record = find_file(folder, MANIFEST)
    manifest = read_json(record, expected="the manifest of a run") if record is not None else {}
    found = manifest.get("guards") if isinstance(manifest, dict) else None
    kinds = {"code": str, "passed": bool, "severity": str, "message": str}
    return [
        verdict
        for verdict in (found if isinstance(found, list) else [])
        if isinstance(verdict, dict) and all(isinstance(verdict.get(name), kind) for name, kind in kinds.items())
    ]


def _is_there(folder: Path) -> bool:
    return folder.is_dir() and ((folder / MANIFEST).exists() or _holder(folder)[0] is not None)


def _holder(folder: Path) -> tuple[int | None, str | None, str | None]:
    """Process, host and the process's beginning, as the claim of the folder has written them."""
    path = find_file(folder, HOLDER) if folder.is_dir() else None
    if path is None or regular_size(path) > _LONGEST_HOLDER:
        return None, None, None
    try:
        found = re.match(_CLAIM, path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        # It went while it was looked at, or is no claim; the manifest has a process, too.
        return None, None, None
    return (int(found[1]), found[2], found[3]) if found else (None, None, None)


def _is_alive(process: int, host: str | None, since: str | None) -> bool:
    """Whether a process is there, and no other under its id; one on another host is believed to be."""
    if host not in {None, socket.gethostname()}:
        return True
    if process < 1:
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        # It is there, and somebody else's.
        pass
    return since is None or begun(process) in {None, since}


def _gone(process: int | None) -> str:
    return "no process holds its folder" if process is None else f"process {process} is gone"


def _advice(state: str, checkpoint: object) -> str:
    if state not in {"died", "interrupted", "failed"}:
        return ""
    if checkpoint is not None:
        return "the command that started it, with --resume auto, goes on from the last checkpoint"
    return "it left no checkpoint; the command that started it, with --overwrite, starts anew"
