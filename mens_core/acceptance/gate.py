"""Run the steps of a profile, one after the other, and write the receipt."""

from __future__ import annotations

import difflib
import hashlib
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs

from mens_core.acceptance.profiles import PACKAGE, PROFILES, read_profiles
from mens_core.acceptance.steps import StepResult, not_run, run_step
from mens_core.artifacts.files import sha256_file, write_json
from mens_core.artifacts.manifest import installed_versions, utc_now
from mens_core.errors import ContractError
from mens_core.machine import this_machine

__all__ = ["RECEIPT_SCHEMA", "run_gate"]

#: The JSON schema of a receipt, and the name it is recorded under.
RECEIPT_SCHEMA = Path(__file__).with_name("receipt_schema.json")
_SCHEMA_NAME = "mens_gate_receipt_v1"


def run_gate(
    profile: str = "m1m4",
    *,
    keep_going: bool = False,
    receipt: str | Path | None = None,
    profiles: str | Path | None = None,
    news: Callable[[StepResult], None] | None = None,
) -> dict[str, Any]:
    """Run a profile's steps and judge each.

    Args:
        profile: name of the profile.
        keep_going: whether the steps after a failed one are run, too.
        receipt: file to write; None for none.
        profiles: file of steps of one's own; None for those that come with the package.
        news: told the result of every step as it ends.

    Returns:
        The receipt, see ``receipt_schema.json``; ``passed`` is the verdict.

    Raises:
        ContractError: if there is no such profile, the file of steps is wrong, or the receipt has no folder.
    """
    source, target = Path(profiles or PROFILES), Path(receipt) if receipt else None
    steps = _steps_of(source, profile)
    if target is not None and not target.absolute().parent.is_dir():
        raise ContractError("the receipt's folder does not exist", where=target, fix=f"mkdir {target.parent}")
    started_at = utc_now()
    results: list[StepResult] = []
    stopped = False
    with tempfile.TemporaryDirectory(prefix="mens-gate-") as work:
        for number, step in enumerate(steps):
            result = not_run(step) if stopped else run_step(step, Path(work) / f"{number:02}-{step.name}")
            stopped = stopped or (result.verdict == "failed" and not keep_going)
            results.append(result)
            if news is not None:
                news(result)
    found = {
        "schema": _SCHEMA_NAME,
        "profile": profile,
        "passed": all(result.verdict == "passed" for result in results),
        "started_at": started_at,
        "seconds": round(sum(result.seconds for result in results), 3),
        "source": _source(),
        "versions": installed_versions(),
        "machine": attrs.asdict(this_machine(), filter=lambda field, _: field.name != "speeds"),
        "sha256": {"package": _package_hash(), "profiles": sha256_file(source)},
        "steps": [attrs.asdict(result) for result in results],
    }
    if target is not None:
        write_json(target, found)
    return found


def _steps_of(source: Path, profile: str) -> Any:
    known = read_profiles(source)
    if profile not in known:
        close = difflib.get_close_matches(profile, known, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ContractError(
            f"there is no profile {profile!r}{hint}", where=source, expected=f"one of {', '.join(known)}"
        )
    return known[profile]


def _source() -> dict[str, Any]:
    """The commit that the package's files are of, and whether they are it; None where they are in no repository."""
    if _git("ls-files", "--error-unmatch", "__init__.py") is None:
        return {"commit": None, "dirty": None}
    commit, changed = _git("rev-parse", "HEAD"), _git("status", "--porcelain")
    return {"commit": commit, "dirty": None if changed is None else bool(changed)}


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(  # noqa: S603 (fixed words)
            ["git", "-C", str(PACKAGE), *words],  # noqa: S607 (whichever git there is)
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:  # no git
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _package_hash() -> str:
    """Sha256 over names and contents of the core's files, caches left out."""
    digest = hashlib.sha256()
    for file in sorted(PACKAGE.rglob("*")):
        if file.is_file() and "__pycache__" not in file.parts:
            digest.update(f"{file.relative_to(PACKAGE).as_posix()} {sha256_file(file)}\n".encode())
    return digest.hexdigest()
