"""No hook writes: neither a file nor a folder, anywhere."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from mens_core.exchange import GenerateSettings
from mens_core.testing import tiny
from mens_core.testing.conformance.capabilities import OPEN
from mens_core.testing.conformance.promises import promise
from mens_core.testing.conformance.workbench import Workbench

__all__ = ["test_no_hook_writes_to_disk"]

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = {"os.mkdir", "os.rename", "os.link", "os.symlink", "os.truncate"}

# An audit hook cannot be taken away again: one is added when it is first needed, and is deaf while nobody watches.
_watching: list[list[str]] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watching:
        return
    opened = event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING
    path = arguments[0] if arguments else None
    # Byte code of a module that is imported late is the interpreter's; /dev is no disk.
    if (opened or event in _CHANGES) and isinstance(path, str | bytes | os.PathLike):
        name = os.fsdecode(path)
        if "__pycache__" not in name and not name.startswith("/dev/"):
            _watching[-1].append(f"{event} {name}")


@cache
def _listen() -> None:
    sys.addaudithook(_audit)


@contextmanager
def _watched(places: list[Path]) -> Iterator[list[str]]:
    """Gives a list of what Python code wrote, and what anybody left in the places."""
    _listen()
    found: list[str] = []
    _watching.append(found)
    try:
        yield found
    finally:
        _watching.pop()
    found += [f"left {path}" for place in places for path in place.rglob("*")]


def test_no_hook_writes_to_disk(workbench: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, backend = workbench.plan(workbench.any_family), workbench.backend
    places = [tmp_path / name for name in ("here", "home", "tmp")]
    for place in places:
        place.mkdir()
    monkeypatch.chdir(places[0])
    for name, place in (("HOME", places[1]), ("XDG_CACHE_HOME", places[1]), ("TMPDIR", places[2])):
        monkeypatch.setenv(name, str(place))
    monkeypatch.setattr(tempfile, "tempdir", None)
    with _watched(places) as written:
        session = backend.open(plan, tiny.SHAPE)
        session = backend.restore(session, backend.state(session))
        backend.step(session, [tiny.batch_of(9, 5)], 1e-2)
        backend.forward(session, tiny.batch_of(9, 5))
        backend.loss(session, tiny.batch_of(9, 5))
        if workbench.capabilities.generate is OPEN:
            backend.generate(session, [3, 4], GenerateSettings(max_new_tokens=2, stop_tokens=()))
    promise(not written, "mens_open", "nothing is written to disk", f"written: {', '.join(written[:5])}")
