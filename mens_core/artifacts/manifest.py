"""training_manifest.json: what was asked, what was decided, what happened, true at every moment.

``status`` goes planned → running → complete, or ends as failed or interrupted. A run that says planned or running
and whose process (``pid`` on ``host``) is no more was killed; the next one that goes on with it says so. Field names
are those of the older system's manifest (schema 5) where it has the same notion; this one is schema 6.
"""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import os
import platform
import socket
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mens_core.artifacts.files import write_json
from mens_core.hf.hub import commit_of
from mens_core.plan import ExecutionPlan

__all__ = ["SCHEMA_VERSION", "Manifest", "installed_versions", "utc_now"]

SCHEMA_VERSION = 6

_VERSIONS_OF = ("mens-core", "numpy", "tokenizers", "torch", "transformers", "bitsandbytes", "jax", "flax", "optax")


def utc_now() -> str:
    """The time in RFC 3339, UTC, seconds."""
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


class Manifest:
    """The manifest of one run; every change is on disk before the next line runs.

    Args:
        path: of training_manifest.json.
        plan: of the run.
        plugin: the backend's distribution and version.
        earlier: the manifest of the same run before it was interrupted; None of a new one.
        step: after which it goes on.
    """

    def __init__(
        self, path: Path, plan: ExecutionPlan, plugin: str, earlier: Mapping[str, Any] | None = None, step: int = 0
    ) -> None:
        self.path = path
        self.fields: dict[str, Any] = _planned(plan, plugin)
        if earlier is not None:
            self.fields |= {name: earlier[name] for name in ("run_id", "created_at")}
            self.fields["guards"] = earlier.get("guards", [])
            self.fields["interruptions"] = [*earlier.get("interruptions", []), _interruption(earlier, step)]
        write_json(path, self.fields)

    def update(self, **fields: Any) -> None:
        """Set fields and rewrite the file atomically."""
        self.fields |= fields
        write_json(self.path, self.fields)

    def finish(self, status: str, **fields: Any) -> None:
        """Set the final status: ``complete``, ``failed`` or ``interrupted``."""
        self.update(status=status, finished_at=utc_now(), **fields)


def _interruption(earlier: Mapping[str, Any], step: int) -> dict[str, Any]:
    """How the process before ended, and after which step its successor goes on."""
    reasons = {
        "interrupted": earlier.get("reason"),
        "failed": earlier.get("error"),
        "complete": "complete",
    }
    return {
        "reason": reasons.get(earlier["status"]) or "killed",
        "at": earlier.get("finished_at"),
        "resumed_at": utc_now(),
        "resumed_from_step": step,
    }


def _planned(plan: ExecutionPlan, plugin: str) -> dict[str, Any]:
    contract, layout = plan.contract, plan.layout
    return {
        "manifest_schema_version": SCHEMA_VERSION,
        "status": "planned",
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "interruptions": [],
        "resumed_from": None,
        "guards": [],
        "run_id": str(uuid.uuid4()),
        "created_at": utc_now(),
        "execution_kernel": plan.execution_kernel,
        "runbook_kernel": plan.runbook_kernel,
        "candle_compat_mode": plan.candle_compat_mode,
        "backend": plan.backend,
        "backend_plugin": plugin,
        "finetune_contract_digest": plan.contract_digest,
        "base_model": plan.model_name,
        "base_commit": commit_of(plan.model_dir),
        "vocab_size": layout.vocab_size,
        "d_model": layout.hidden_size,
        "n_heads": layout.num_heads,
        "n_layers": layout.num_layers,
        "provenance_base_family": contract.provenance.base_family,
        "provenance_upstream_model_id": contract.provenance.upstream_model_id,
        "provenance_license_class": contract.provenance.license_class,
        "provenance_attribution_required": contract.provenance.attribution_required,
        "adapter_tag": contract.adapter.adapter_tag,
        "training_deployment_target": contract.output.deployment_target,
        "train_file": str(plan.train_file),
        "eval_file": str(plan.eval_file) if plan.eval_file is not None else None,
        "rank": contract.adapter.rank,
        "alpha": contract.adapter.alpha,
        "seq_len": contract.data.seq_len,
        "epochs": contract.training.epochs,
        "seed": contract.training.seed,
        "grad_accum": contract.training.grad_accum,
        "training_objective_note": "chatml_assistant_turns_cross_entropy_mean_over_window",
        "plan": plan.as_dict(),
        "versions": installed_versions(),
    }


def installed_versions() -> dict[str, str]:
    """Version of the interpreter and of every package that has a say in the numbers, as far as it is installed."""
    installed = {"python": platform.python_version()}
    for name in _VERSIONS_OF:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed
