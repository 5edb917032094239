"""How fast kernels ran on this machine: one small file in the user's cache, read by the planner.

    measuring ──▶ speeds.json ──▶ Machine.speeds ──▶ a backend's seconds_per_step

A speed holds only where it was measured: with the same processor, as many processors, the same thread settings and
the same versions. One that was measured elsewhere is not used, and the plan says so; a damaged file is logged.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
from pathlib import Path
from typing import Any

from mens_core.atomic import replacing
from mens_core.contract import kernel_parts
from mens_core.plan import Machine, Speed
from mens_core.plugins import installed_backends

__all__ = ["conditions", "outdated_speeds", "read_speeds", "speeds_file", "store_speed"]

_FORMAT = "mens.speeds.v1"
# What tells a tensor library how many threads to use, before it is asked.
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "XLA_FLAGS")
_MEND = "measure again: python -m mens_core doctor --measure"

_log = logging.getLogger(__name__)


def speeds_file() -> Path:
    """Where measured speeds are kept: in ``$XDG_CACHE_HOME``, which is ``~/.cache`` where it is not set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mens-core" / "speeds.json"


def conditions(kernel: str, machine: Machine) -> dict[str, Any]:
    """What a measurement of a kernel depends on, ready for JSON."""
    backend = (kernel_parts(kernel) or (kernel, ""))[0]
    versions = {}
    for info in installed_backends():
        if info.name == backend and not info.missing:
            versions = {name: importlib.metadata.version(name) for name in (info.distribution, *info.needs)}
    return {
        "processor": machine.processor,
        "cpu_count": machine.cpu_count,
        "accelerators": list(machine.accelerators),
        "threads": {name: os.environ[name] for name in _THREADS if name in os.environ},
        "versions": versions,
    }


def read_speeds(machine: Machine, file: Path | None = None) -> dict[str, Speed]:
    """The speeds that hold on this machine, as ``Machine.speeds`` keeps them.

    Args:
        machine: as it is now.
        file: instead of ``speeds_file()``.
    """
    entries, outdated = _entries(file or speeds_file()), outdated_speeds(machine, file)
    return {
        key: Speed(seconds=entry["seconds"], source=entry["source"])
        for key, entry in entries.items()
        if key not in outdated
    }


def outdated_speeds(machine: Machine, file: Path | None = None) -> dict[str, str]:
    """The speeds that were measured under other conditions: ``<kernel> <device> <dtype>`` → a sentence that says which.

    Args:
        machine: as it is now.
        file: instead of ``speeds_file()``.
    """
    file, outdated = file or speeds_file(), {}
    for key, entry in _entries(file).items():
        now = conditions(key.partition(" ")[0], machine)
        changed = [name for name in now if entry["conditions"].get(name) != now[name]]
        if changed:
            outdated[key] = f"the speed of {key} in {file} was measured with another {', '.join(changed)}; {_MEND}"
    return outdated


def store_speed(key: str, speed: Speed, machine: Machine, file: Path | None = None) -> None:
    """Keep a speed beside the others; the file is replaced whole, and a damaged one is lost.

    Args:
        key: ``<kernel> <device> <dtype>``.
        speed: as measured.
        machine: on which it was measured.
        file: instead of ``speeds_file()``.

    Raises:
        OSError: if the file cannot be written.
    """
    file = file or speeds_file()
    kept = {"conditions": conditions(key.partition(" ")[0], machine), "seconds": dict(speed.seconds)}
    body = {"format": _FORMAT, "speeds": _entries(file) | {key: kept | {"source": speed.source}}}
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as (stream,):
        json.dump(body, stream, indent=2, allow_nan=False)


def _entries(file: Path) -> dict[str, dict[str, Any]]:
    """What the file holds, every entry of the right form; nothing, and a word in the log, if it is damaged."""
    try:
        body = json.loads(file.read_text(encoding="utf-8"))
        if body["format"] != _FORMAT:
            raise ValueError(f"format {body['format']!r}, expected {_FORMAT!r}")  # noqa: TRY301
        for key, entry in body["speeds"].items():
            if not _sound(entry):
                raise ValueError(f"the entry {key!r} is malformed")  # noqa: TRY301
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _log.warning("measured speeds cannot be read from %s: %s: %s; %s", file, type(error).__name__, error, _MEND)
        return {}
    entries: dict[str, dict[str, Any]] = body["speeds"]
    return entries


def _sound(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("source"), str)
        and isinstance(entry.get("conditions"), dict)
        and isinstance(entry.get("seconds"), dict)
        and all(isinstance(value, float | int) and 0 <= value < 1 for value in entry["seconds"].values())
    )
