"""One step of the gate: run in child processes, counted, and judged. What shows nothing does not pass."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from mens_core.acceptance.checks import CHECKS
from mens_core.acceptance.profiles import PACKAGE, Step
from mens_core.acceptance.recorder import RECORD
from mens_core.errors import MensError

__all__ = ["StepResult", "not_run", "run_step"]

_PYTEST_OPTIONS = ("--import-mode=importlib", "--strict-markers", "-W", "error", "-p", "no:cacheprovider", "-q")
_LINES_OF_OUTPUT = 30


@attrs.frozen(kw_only=True)
class StepResult:
    """What a step came to.

    Attributes:
        name: of the step.
        rows: of the runbook.
        part: of the gate.
        commands: that ran, as one would type them.
        verdict: ``passed``, ``failed`` or ``not run``.
        reason: why it did not pass; empty if it did.
        collected: tests that were selected, or claims that were checked.
        passed: of them.
        failed: of them.
        skipped: of them.
        seconds: wall time.
        measured: test or check → name → number or text, as they recorded it.
        output: the last lines that a failed step printed.
    """

    name: str
    rows: Sequence[str]
    part: str
    commands: Sequence[str]
    verdict: str
    reason: str = ""
    collected: int = 0
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    measured: Mapping[str, Mapping[str, Any]] = attrs.field(factory=dict)
    output: str = ""


def not_run(step: Step) -> StepResult:
    """The result of a step before which the gate stopped."""
    return _result(step, verdict="not run", reason="an earlier step failed")


def run_step(step: Step, folder: Path) -> StepResult:
    """Run a step.

    Args:
        step: to run.
        folder: to work in; made here.

    Returns:
        Its result; whatever goes wrong is a verdict and no exception.
    """
    folder.mkdir()
    started = time.perf_counter()
    result = _run_tests(step, folder) if step.file is not None else _run_commands(step, folder)
    return attrs.evolve(result, seconds=round(time.perf_counter() - started, 3))


def _run_tests(step: Step, folder: Path) -> StepResult:
    assert step.file is not None
    if not step.file.is_file():
        return _result(step, verdict="failed", reason=f"the file of its tests is missing: {step.file}")
    record = folder / "record.json"
    settings = folder / "pytest.ini"
    settings.write_text("[pytest]\nxfail_strict = true\n", encoding="utf-8")
    plugin = ("-p", "mens_core.acceptance.recorder", "-c", str(settings), "--rootdir", str(step.file.parent))
    words = [*_PYTEST_OPTIONS, *plugin, f"--basetemp={folder / 'tmp'}", str(step.file)]
    words += ["-k", step.keyword] if step.keyword else []
    code, output = _child(["pytest", *words], folder, {RECORD: str(record)})
    if not record.is_file():
        return _result(
            step, verdict="failed", reason=f"pytest ended with code {code} and left no record", output=output
        )
    found = json.loads(record.read_text(encoding="utf-8"))
    reason = _why_not(found, code)
    return _result(
        step,
        verdict="failed" if reason else "passed",
        reason=reason,
        **{name: found[name] for name in ("collected", "passed", "failed", "skipped")},
        measured=found["measured"],
        output=output if reason else "",
    )


def _why_not(found: Mapping[str, Any], code: int) -> str:
    """Why tests do not pass as a step; empty if they do."""
    named = "; ".join(found["reasons"][:3])
    if found["failed"]:
        return f"{found['failed']} failed: {named}"
    if found["skipped"]:
        return f"{found['skipped']} skipped, and what is skipped shows nothing: {named}"
    if not found["collected"]:
        return "no test was collected: the selection matches nothing"
    if found["passed"] != found["collected"]:
        return f"{found['passed']} of {found['collected']} collected tests ran"
    return f"pytest ended with code {code}" if code else ""


def _run_commands(step: Step, folder: Path) -> StepResult:
    outputs = []
    for command in step.commands:
        code, output = _child(["mens_core", *command], folder, {})
        outputs.append(output)
        if code:
            reason = f"'{command[0]}' ended with code {code}"
            return _result(step, verdict="failed", reason=reason, collected=1, failed=1, output=output)
    try:
        # A manifest has the paths as they were typed.
        with contextlib.chdir(folder):
            claims, measured = CHECKS[str(step.check)](folder, outputs)
    except (MensError, OSError, KeyError, TypeError, ValueError) as error:
        return _result(step, verdict="failed", reason=f"what was to be checked cannot be read: {error!r}", failed=1)
    broken = [f"{what} ({detail})" for what, holds, detail in claims if not holds]
    return _result(
        step,
        verdict="failed" if broken or not claims else "passed",
        reason="; ".join(broken) if claims else "nothing was checked",
        collected=len(claims),
        passed=len(claims) - len(broken),
        failed=len(broken),
        measured={str(step.check): measured},
    )


def _child(module_and_words: Sequence[str], folder: Path, environment: Mapping[str, str]) -> tuple[int, str]:
    """Run a module; its exit code and the last lines it printed."""
    # What was measured or cached here before is this user's and says nothing about the package; nothing is downloaded;
    # matrices this small gain nothing from a second thread.
    settings = {"XDG_CACHE_HOME": str(folder.parent / "cache"), "HF_HUB_OFFLINE": "1"}
    settings["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    done = subprocess.run(  # noqa: S603 (this interpreter, on this package's own modules)
        [sys.executable, "-m", *module_and_words],
        cwd=folder,
        env=os.environ | settings | threads | dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    return done.returncode, "\n".join(done.stdout.splitlines()[-_LINES_OF_OUTPUT:])


def _result(step: Step, **fields: Any) -> StepResult:
    return StepResult(name=step.name, rows=step.rows, part=step.part, commands=_written(step), **fields)


def _written(step: Step) -> tuple[str, ...]:
    """The commands as one would type them."""
    if step.file is None:
        return tuple(shlex.join(["python", "-m", "mens_core", *command]) for command in step.commands)
    where = (
        f"{step.file.parent.relative_to(PACKAGE.parent)}".replace(os.sep, ".") if PACKAGE in step.file.parents else ""
    )
    target = ["--pyargs", where] if where else [str(step.file)]
    return (shlex.join(["python", "-m", "pytest", *target, *(["-k", step.keyword] if step.keyword else [])]),)
