"""The run directory: one run in one folder, refused if there is one already.

    with RunDirectory.claim(contract.output) as folder: ...

A lock file, held by the operating system as long as the process lives, keeps two runs out of one folder.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import filelock

from mens_core.artifacts.checkpoints import keep_only, remove_leftovers
from mens_core.errors import RunDirectoryError
from mens_core.hf.files import read_json
from mens_core.sections import OutputSpec

__all__ = ["CHECKPOINTS", "HOLDER", "MANIFEST", "PREFLIGHT", "RunDirectory", "begun"]

MANIFEST = "training_manifest.json"
PREFLIGHT = "training-preflight.json"
CHECKPOINTS = "checkpoints"
HOLDER = ".run.holder"
"""Says who has claimed the folder, for people and for ``watching``."""

# What a run writes, and all that overwriting one may remove.
_RUN_FILES = (
    MANIFEST,
    PREFLIGHT,
    "parity.json",
    "telemetry.jsonl",
    "MODEL_CARD.md",
    "adapter_model.safetensors",
    "adapter_config.json",
    "populi_adapter_manifest_v3.json",
)

_LOCK = ".run.lock"

# What a process leaves that was killed while it wrote one of these files, see ``mens_core.atomic``.
_HALF_WRITTEN = re.compile(rf"\.({'|'.join(map(re.escape, _RUN_FILES))})\.[0-9a-f]{{8}}\.tmp")


@attrs.frozen
class RunDirectory:
    """A claimed folder and the names in it."""

    path: Path

    @property
    def manifest(self) -> Path:
        """training_manifest.json."""
        return self.path / MANIFEST

    @property
    def parity(self) -> Path:
        """parity.json, of a run that was certified."""
        return self.path / "parity.json"

    @property
    def preflight(self) -> Path:
        """training-preflight.json."""
        return self.path / PREFLIGHT

    @property
    def telemetry(self) -> Path:
        """telemetry.jsonl."""
        return self.path / "telemetry.jsonl"

    @property
    def model_card(self) -> Path:
        """MODEL_CARD.md."""
        return self.path / "MODEL_CARD.md"

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints; not there before the first."""
        return self.path / CHECKPOINTS

    def earlier(self) -> dict[str, Any] | None:
        """The manifest of the run that the folder holds; None if it holds none.

        Raises:
            ModelError: if it cannot be read.
        """
        return read_json(self.manifest, expected="the manifest of a run") if self.manifest.exists() else None

    def clear(self) -> None:
        """Remove a run, the manifest last, so that what is left is a run's at every moment."""
        keep_only(self.checkpoints, ())
        if self.checkpoints.is_dir() and not any(self.checkpoints.iterdir()):
            self.checkpoints.rmdir()
        for name in reversed(_RUN_FILES):
            (self.path / name).unlink(missing_ok=True)

    def written(self) -> tuple[Path, ...]:
        """The files that the run has written so far, the manifest left out."""
        return tuple(self.path / name for name in _RUN_FILES if name != MANIFEST and (self.path / name).is_file())

    @classmethod
    @contextmanager
    def claim(cls, output: OutputSpec, *, goes_on: bool = False) -> Iterator[RunDirectory]:
        """Create the folder and hold its lock until the block ends.

        Args:
            output: the folder, whose parents are created too, and whether an earlier run's files are removed.
            goes_on: whether a run that it holds is left as it is, but for what a killed process left half-written.

        Raises:
            RunDirectoryError: if another process holds it, it holds a run, or it holds other people's files.
        """
        path = output.output_dir
        if path is None:
            raise RunDirectoryError("output_dir is required", fix="python -m mens_core train --help")
        created = not path.exists()
        try:
            path.mkdir(parents=True, exist_ok=True)
        except (OSError, FileExistsError) as error:
            raise RunDirectoryError(f"the output folder cannot be made: {error}", where=path) from error
        lock = filelock.FileLock(path / _LOCK)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout as error:
            holder = path / HOLDER
            raise RunDirectoryError(
                "another run is using the output folder",
                where=f"{path}, held by {holder.read_text() if holder.exists() else 'an unknown process'}",
                fix="wait for it, or choose another --output-dir",
            ) from error
        except OSError as error:
            raise RunDirectoryError(f"the output folder cannot be written to: {error}", where=path) from error
        try:
            _remove_half_written(path)
            _make_room(cls(path), overwrite=output.overwrite, goes_on=goes_on)
            (path / HOLDER).write_text(_claimant())
            created = False
            yield cls(path)
        finally:
            (path / HOLDER).unlink(missing_ok=True)
            lock.release()
            (path / _LOCK).unlink(missing_ok=True)
            if created:
                path.rmdir()


def begun(process: int) -> str | None:
    """When a process began, in the system's ticks and only to be compared; None if it is not there or not told.

    A process id is given again once its process has gone; together with this it is one process's alone.
    """
    try:
        told = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # Behind the name in brackets, which may hold anything, the twentieth field (proc(5), starttime).
    return told.rpartition(")")[2].split()[19]


def _claimant() -> str:
    since = begun(os.getpid())
    return f"process {os.getpid()} on {socket.gethostname()}" + (f", begun at {since}" if since else "")


def _remove_half_written(path: Path) -> None:
    for entry in [*path.iterdir()]:
        if entry.name == HOLDER or _HALF_WRITTEN.fullmatch(entry.name):
            entry.unlink()
    remove_leftovers(path / CHECKPOINTS)


def _make_room(folder: RunDirectory, *, overwrite: bool, goes_on: bool) -> None:
    found = [entry for entry in folder.path.iterdir() if entry.name != _LOCK]
    if not found:
        return
    if not folder.manifest.exists():
        names = ", ".join(sorted(entry.name for entry in found)[:5])
        raise RunDirectoryError(
            "the output folder holds files that are not a run's",
            where=f"{folder.path}: {names}",
            fix="choose an empty folder",
        )
    if goes_on:
        return
    if not overwrite:
        raise RunDirectoryError(
            "the output folder already holds a run",
            where=folder.path,
            fix="go on with it by --resume auto, choose another --output-dir, or replace it by --overwrite",
        )
    folder.clear()
