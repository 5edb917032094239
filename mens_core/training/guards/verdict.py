"""A verdict of a guard, and what is done with it: it stands in the manifest, and one that failed ends the run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from mens_core.artifacts.manifest import Manifest
from mens_core.errors import TrainingError
from mens_core.training.telemetry import Telemetry

__all__ = ["Judge", "Verdict"]


@attrs.frozen(kw_only=True)
class Verdict:
    """What one guard found.

    Attributes:
        code: a word that never changes.
        passed: whether it holds.
        message: what was found, in one sentence.
        numbers: what it was judged by.
        fix: the one command or change that mends it.
        severity: ``error`` if the run fails where it does not hold, ``warning`` if it goes on.
    """

    code: str
    passed: bool
    message: str
    numbers: Mapping[str, float | int | None] = attrs.field(factory=dict)
    fix: str = ""
    severity: str = "error"


class Judge:
    """Keeps a run's verdicts in its manifest, one a code, in the order in which they were last judged.

    Telemetry hears of those that did not pass.

    Args:
        manifest: of the run. Of the verdicts that earlier processes left in it, those that passed stay until they are
            judged anew; the others were what ended them.
        telemetry: of the run.
    """

    def __init__(self, manifest: Manifest, telemetry: Telemetry) -> None:
        self._manifest, self._telemetry = manifest, telemetry
        earlier = manifest.fields["guards"]
        self._verdicts: dict[str, Mapping[str, Any]] = {entry["code"]: entry for entry in earlier if entry["passed"]}

    def record(self, *verdicts: Verdict) -> None:
        """Write verdicts down, all of them, and then fail the run if one of them asks for it.

        Raises:
            TrainingError: naming the first code that failed.
        """
        for verdict in verdicts:
            self._verdicts.pop(verdict.code, None)
            self._verdicts[verdict.code] = attrs.asdict(verdict)
        self._manifest.update(guards=list(self._verdicts.values()))
        broken = [verdict for verdict in verdicts if not verdict.passed]
        for verdict in broken:
            told = {"code": verdict.code, "severity": verdict.severity, "message": verdict.message}
            self._telemetry.emit("guard", told)
        for verdict in broken:
            if verdict.severity == "error":
                raise TrainingError(f"{verdict.code}: {verdict.message}", fix=verdict.fix or None)
