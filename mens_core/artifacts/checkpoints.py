"""Checkpoints: all that a run has to know to go on, in folders that are whole or not there.

    checkpoints/step-00000100/
        adapter.safetensors     the adapter, by the names all backends share
        optimizer.safetensors   its moments
        curve.safetensors       loss and seconds of every window so far, float64; a skipped one's loss is NaN
        state.json              where the run stands, and what it was begun with
        COMPLETE                size and sha256 of each; written last

A folder is built under a hidden name beside its place; renaming it is what makes it a checkpoint.
"""

from __future__ import annotations

import re
import secrets
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from mens_core.artifacts.files import sha256_file, write_json
from mens_core.artifacts.tensors import read_tensors, write_tensors
from mens_core.atomic import appearing
from mens_core.errors import ModelError, ResumeError
from mens_core.exchange import TrainingState
from mens_core.hf.files import read_json, regular_size

__all__ = [
    "COMPLETE",
    "Checkpoint",
    "check_checkpoint",
    "checkpoint_folders",
    "checkpoint_name",
    "keep_only",
    "read_checkpoint",
    "remove_leftovers",
    "write_checkpoint",
]

COMPLETE = "COMPLETE"

_SCHEMA_VERSION = 2
_ADAPTER, _OPTIMIZER, _CURVE = "adapter.safetensors", "optimizer.safetensors", "curve.safetensors"
_STATE = "state.json"
_FILES = (_ADAPTER, _OPTIMIZER, _CURVE, _STATE)
_NAME = re.compile(r"step-(\d{8,})")
_HIDDEN = re.compile(r"\.step-\d{8,}\..+")


@attrs.frozen(kw_only=True)
class Checkpoint:
    """One checkpoint, read.

    Attributes:
        path: its folder.
        state: adapter, optimizer and its own step, which skipped windows do not advance.
        record: what state.json says.
        curve: ``losses`` and ``step_seconds``, (windows,) float64 each.
    """

    path: Path
    state: TrainingState
    record: Mapping[str, Any]
    curve: Mapping[str, NDArray[np.float64]]

    @property
    def step(self) -> int:
        """Windows that are done, skipped ones among them; the checkpoint is called by it."""
        return len(self.curve["losses"])


def checkpoint_name(step: int) -> str:
    """The folder of a step, such as step-00000100."""
    return f"step-{step:08d}"


def checkpoint_folders(home: Path) -> dict[int, Path]:
    """Step → folder of every checkpoint in ``checkpoints/``, whole or not, the newest first; none without it."""
    found = (_NAME.fullmatch(path.name) for path in home.iterdir()) if home.is_dir() else ()
    steps = {int(match[1]): home / match[0] for match in found if match}
    return dict(sorted(steps.items(), reverse=True))


def write_checkpoint(
    home: Path, state: TrainingState, record: Mapping[str, Any], curve: Mapping[str, NDArray[np.float64]]
) -> int:
    """Write a checkpoint; whatever lay in its place is replaced.

    Args:
        home: ``checkpoints/``, made if it is not there; the run's folder has to be.
        state: a copy of the session's.
        record: for state.json.
        curve: as ``Checkpoint`` has it.

    Returns:
        Its size, in bytes.

    Raises:
        OSError: as the file system reports it; other checkpoints are then untouched.
    """
    home.mkdir(exist_ok=True)
    step = len(curve["losses"])
    place = home / checkpoint_name(step)
    if place.exists():
        _remove(place)
    with appearing(place) as folder:
        write_tensors(folder / _ADAPTER, state.adapter, {})
        write_tensors(folder / _OPTIMIZER, state.optimizer, {})
        write_tensors(folder / _CURVE, curve, {})
        write_json(folder / _STATE, _described(step, state, record))
        sizes = {name: (folder / name).stat().st_size for name in _FILES}
        files = {name: {"bytes": size, "sha256": sha256_file(folder / name)} for name, size in sizes.items()}
        write_json(folder / COMPLETE, {"schema_version": _SCHEMA_VERSION, "files": files})
    return sum(sizes.values())


def check_checkpoint(folder: Path) -> str:
    """Recompute every size and hash of a checkpoint.

    Returns:
        The sha256 of COMPLETE, which stands for all of it.

    Raises:
        ResumeError: naming the first file that is missing or is not what COMPLETE says.
    """
    complete = folder / COMPLETE
    if not complete.is_file():
        raise ResumeError(f"the checkpoint has no {COMPLETE}", where=folder)
    try:
        files = read_json(complete, expected="sizes and hashes")["files"]
        for name in _FILES:
            size, digest = int(files[name]["bytes"]), str(files[name]["sha256"])
            found = regular_size(folder / name)
            if found != size:
                raise ResumeError(f"{name} has {found} bytes, {COMPLETE} says {size}", where=folder)
            if sha256_file(folder / name) != digest:
                raise ResumeError(f"{name} is not what its sha256 in {COMPLETE} says", where=folder)
        return sha256_file(complete)
    except (KeyError, TypeError, ValueError) as error:
        raise ResumeError(f"{COMPLETE} cannot be read: {error!r}", where=folder) from error
    except (ModelError, OSError) as error:
        raise ResumeError(str(error).splitlines()[0], where=folder) from error


def read_checkpoint(folder: Path) -> Checkpoint:
    """Check a checkpoint and read it.

    Raises:
        ResumeError: if it is damaged, or written in a form that this version does not know.
    """
    check_checkpoint(folder)
    try:
        record = read_json(folder / _STATE, expected="the state of a run")
        if record["schema_version"] != _SCHEMA_VERSION:
            raise ResumeError(
                f"the checkpoint has schema {record['schema_version']}", where=folder, expected=f"{_SCHEMA_VERSION}"
            )
        # Copied, since the files may be removed while the run goes on.
        adapter, optimizer, curve = (
            {name: np.array(tensor) for name, tensor in read_tensors(folder / file).items()}
            for file in (_ADAPTER, _OPTIMIZER, _CURVE)
        )
        state = TrainingState(adapter=adapter, optimizer=optimizer, step=int(record["optimizer_step"]))
        problem = _problem(state, curve, int(record["step"]))
        if problem is not None:
            raise ResumeError(f"the checkpoint's {problem}", where=folder)
    except (KeyError, TypeError, ValueError) as error:
        raise ResumeError(f"{_STATE} cannot be read: {error!r}", where=folder) from error
    except ModelError as error:
        raise ResumeError(str(error).splitlines()[0], where=folder) from error
    return Checkpoint(path=folder, state=state, record=record, curve=curve)


def _problem(state: TrainingState, curve: Mapping[str, NDArray[np.float64]], step: int) -> str | None:
    """What no run of ours would have saved."""
    for name, tensor in {**state.adapter, **state.optimizer}.items():
        if tensor.dtype != np.float32:
            return f"{name} is of type {tensor.dtype}, not float32"
        if not np.isfinite(tensor).all():
            return f"{name} is not finite"
    if not curve["losses"].shape == curve["step_seconds"].shape == (step,):
        return "curve has not one loss a step"
    if not (curve["step_seconds"] >= 0).all():
        return "curve has a step of less than no time"
    return None if 0 <= state.step <= step else f"optimizer has taken {state.step} of {step} steps"


def keep_only(home: Path, steps: Iterable[int]) -> None:
    """Remove all checkpoints but those of some steps, and what is left of others.

    Raises:
        OSError: as the file system reports it.
    """
    kept = set(steps)
    for step, folder in checkpoint_folders(home).items():
        if step not in kept:
            _remove(folder)
    remove_leftovers(home)


def remove_leftovers(home: Path) -> None:
    """Remove what a process left that was killed while it saved or removed a checkpoint."""
    for path in [*home.iterdir()] if home.is_dir() else []:
        if _HIDDEN.fullmatch(path.name):
            shutil.rmtree(path)


def _described(step: int, state: TrainingState, record: Mapping[str, Any]) -> dict[str, Any]:
    # A record that was read holds these three as well.
    return {**record, "schema_version": _SCHEMA_VERSION, "step": step, "optimizer_step": state.step}


def _remove(folder: Path) -> None:
    """Take a checkpoint out of sight in one move, and then apart."""
    hidden = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    folder.rename(hidden)
    shutil.rmtree(hidden)
