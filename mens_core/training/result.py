"""What a finished run gives back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from mens_core.artifacts.files import sha256_file
from mens_core.artifacts.rundir import RunDirectory
from mens_core.plan import ExecutionPlan
from mens_core.training.telemetry import told_losses

__all__ = ["RunResult", "finished_result", "result_of"]


@attrs.frozen(kw_only=True)
class RunResult:
    """What a finished run gives back.

    Attributes:
        output_dir: the run directory.
        adapter_dir: the folder PEFT opens; the run directory itself.
        manifest: training_manifest.json as a dictionary.
        losses: mean training loss of each window, in nats per supervised token; NaN where it was skipped.
        eval_loss_before: held-out loss of the base; None without an eval.jsonl.
        eval_loss_after: held-out loss with the adapter; None without an eval.jsonl.
        resumed_from: the checkpoint that this process went on from; None if it began the run.
        interruptions: why each process before this one ended, such as SIGTERM, ``max_time`` or killed.
        best_checkpoint: that of the lowest held-out loss; None if none is kept.
    """

    output_dir: Path
    adapter_dir: Path
    manifest: Mapping[str, Any]
    losses: tuple[float, ...]
    eval_loss_before: float | None
    eval_loss_after: float | None
    resumed_from: Path | None
    interruptions: tuple[str, ...]
    best_checkpoint: Path | None


def result_of(
    folder: RunDirectory, manifest: Mapping[str, Any], losses: tuple[float, ...], resumed_from: Path | None
) -> RunResult:
    """From the manifest of a complete run.

    Args:
        folder: of the run.
        manifest: its fields.
        losses: of every window.
        resumed_from: the checkpoint that this process went on from.
    """
    results = manifest["results"]
    best = results.get("best_checkpoint")
    return RunResult(
        output_dir=folder.path,
        adapter_dir=folder.path,
        manifest=manifest,
        losses=losses,
        eval_loss_before=results.get("eval_loss_before"),
        eval_loss_after=results.get("eval_loss_after"),
        resumed_from=resumed_from,
        interruptions=tuple(entry["reason"] for entry in manifest.get("interruptions", [])),
        best_checkpoint=None if best is None else folder.path / best,
    )


def finished_result(plan: ExecutionPlan, folder: RunDirectory) -> RunResult | None:
    """The result of a run that is to be gone on with and is complete already; None if there is something to do.

    Args:
        plan: what is asked for.
        folder: that may hold the run.
    """
    manifest = folder.earlier()
    if manifest is None or manifest["status"] != "complete":
        return None
    if manifest["finetune_contract_digest"] != plan.contract_digest or plan.contract.checkpoint.resume != "auto":
        return None
    written = manifest["sha256"]["run_files"]
    if {file.name: sha256_file(file) for file in folder.written()} != written:
        return None
    return result_of(folder, manifest, told_losses(folder.telemetry), None)
