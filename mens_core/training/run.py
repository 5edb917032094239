"""One run, from a plan to a complete run directory.

Everything that can be wrong with the rows is found before the folder is touched. From then on the manifest says
at every moment how far the run has come.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from mens_core.artifacts.adapter import initial_state, write_adapter
from mens_core.artifacts.adapters import open_adapter
from mens_core.artifacts.files import sha256_file, write_json, write_text
from mens_core.artifacts.manifest import Manifest
from mens_core.artifacts.model_card import model_card
from mens_core.artifacts.rundir import RunDirectory
from mens_core.backend import Backend
from mens_core.exchange import TrainingState
from mens_core.hf.inventory import read_inventory
from mens_core.plan import ExecutionPlan
from mens_core.text.encode import open_encoder
from mens_core.text.pack import Batching, total_steps
from mens_core.training.accuracy import beside_measured
from mens_core.training.data import ReadRows, check_enough, load_rows
from mens_core.training.guards import check_changed, check_trainable
from mens_core.training.loop import Progress, evaluate, train
from mens_core.training.memory import peak_memory_bytes
from mens_core.training.telemetry import TELEMETRY_SCHEMA, Observer, Telemetry

__all__ = ["RunResult", "run_plan"]


@attrs.frozen(kw_only=True)
class RunResult:
    """What a finished run gives back.

    Attributes:
        output_dir: the run directory.
        adapter_dir: the folder PEFT opens; the run directory itself.
        manifest: training_manifest.json as a dictionary.
        losses: mean training loss of each optimizer step, in nats per supervised token.
        eval_loss_before: held-out loss of the base; None without an eval.jsonl.
        eval_loss_after: held-out loss with the adapter; None without an eval.jsonl.
    """

    output_dir: Path
    adapter_dir: Path
    manifest: Mapping[str, Any]
    losses: tuple[float, ...]
    eval_loss_before: float | None
    eval_loss_after: float | None


def run_plan(
    plan: ExecutionPlan,
    backend: Backend,
    observers: Sequence[Observer],
    certificate: Mapping[str, Any] | None = None,
) -> RunResult:
    """Train as planned.

    Args:
        plan: from the planner.
        backend: the one the plan chose.
        observers: called with every telemetry event, after the plugins' own.
        certificate: of parity, which the run keeps; None if none was asked for.

    Raises:
        DataError: a row is malformed, too many are too long, or none is left; nothing has been written then.
        RunDirectoryError: the output folder cannot be used.
        TrainingError: the run was stopped; the manifest says ``failed`` and why.
        KeyboardInterrupt: passed on; the manifest says ``interrupted``.
    """
    rows, held_out = _read_data(plan, observers)
    with RunDirectory.claim(plan.contract.output) as folder:
        manifest = Manifest(folder.manifest, plan, backend.plugin)
        try:
            write_json(folder.preflight, _preflight(plan))
            if certificate is not None:
                write_json(folder.parity, certificate)
                manifest.update(parity=_parity(folder.parity, certificate))
            manifest.update(
                status="running",
                pid=os.getpid(),
                counters=rows.counters(),
                lengths=rows.ledger.as_dict(),
                sha256=_hashes(plan),
            )
            with Telemetry(folder.telemetry, [backend.event, *observers]) as telemetry:
                results, progress = _train(plan, backend, rows, held_out, folder, telemetry)
        except KeyboardInterrupt:
            manifest.finish("interrupted")
            raise
        except BaseException as error:
            manifest.finish("failed", error=f"{type(error).__name__}: {error}")
            raise
        hashes = manifest.fields["sha256"] | {"run_files": {file.name: sha256_file(file) for file in folder.written()}}
        manifest.finish("complete", results=results, estimate=_estimate(plan, results), sha256=hashes)
        return RunResult(
            output_dir=folder.path,
            adapter_dir=folder.path,
            manifest=manifest.fields,
            losses=tuple(progress.losses),
            eval_loss_before=results.get("eval_loss_before"),
            eval_loss_after=results.get("eval_loss_after"),
        )


def _estimate(plan: ExecutionPlan, results: Mapping[str, Any]) -> dict[str, Any]:
    return beside_measured(
        plan,
        peak_memory_bytes=results["peak_memory_bytes"],
        seconds_per_step=results["median_step_seconds"],
        tokens_per_step=results["tokens_trained"] / results["optimizer_steps"],
    )


def _read_data(plan: ExecutionPlan, observers: Sequence[Observer]) -> tuple[ReadRows, ReadRows | None]:
    assert plan.train_file is not None, "a plan to train has rows"
    encoder = open_encoder(plan.tokenizer, plan.tokenizer_file, plan.model_dir, plan.layout)

    def news(rows: int) -> None:
        # The run has no folder yet, and so no telemetry.
        for observer in observers:
            observer({"event": "rows_read", "payload": {"rows": rows}})

    rows = load_rows(plan.train_file, plan.contents["train.jsonl"], plan.contract, encoder, news=news)
    check_enough(plan.train_file, rows, plan.contract.data.min_rows)
    if plan.eval_file is None:
        return rows, None
    return rows, load_rows(plan.eval_file, plan.contents["eval.jsonl"], plan.contract, encoder, news=news)


def _train(
    plan: ExecutionPlan,
    backend: Backend,
    rows: ReadRows,
    held_out: ReadRows | None,
    folder: RunDirectory,
    telemetry: Telemetry,
) -> tuple[dict[str, Any], Progress]:
    spec = plan.contract.training
    telemetry.emit("train_start", _train_start(plan, rows, held_out))
    shape = Batching.of(plan.contract).shape(rows.rows, spec.epochs)
    session = backend.open(plan, shape)
    start = _start(plan, backend.state(session))
    check_trainable(start)
    session = backend.restore(session, start)
    results: dict[str, Any] = dict(rows.counters())
    if held_out is not None:
        results["eval_loss_before"] = evaluate(backend, session, held_out.rows, spec.batch_size)
        telemetry.emit("evaluation", {"step": 0, "eval_loss": results["eval_loss_before"]})
    progress = train(backend, session, rows.rows, plan.contract, telemetry)
    if held_out is not None:
        results["eval_loss_after"] = evaluate(backend, session, held_out.rows, spec.batch_size)
        results["eval_counters"] = held_out.counters()
        telemetry.emit("evaluation", {"step": len(progress.losses), "eval_loss": results["eval_loss_after"]})
    end = backend.state(session)
    check_changed(start, end)
    write_adapter(folder.path, end.adapter, plan)
    results |= progress.summary() | {"peak_memory_bytes": peak_memory_bytes()}
    parameters = sum(tensor.size for tensor in end.adapter.values())
    card = model_card(plan, modules=len(end.adapter) // 2, parameters=parameters, results=results)
    write_text(folder.model_card, card)
    telemetry.emit(
        "train_complete",
        {"ok": True, "execution_kernel": plan.execution_kernel, "output_dir": str(folder.path), **results},
    )
    return results, progress


def _start(plan: ExecutionPlan, opened: TrainingState) -> TrainingState:
    """The adapter to begin with: a new one, or the one that the run goes on from."""
    path = plan.contract.adapter.start_from
    if path is None:
        return initial_state(opened.adapter, plan.contract.training.seed)
    return TrainingState(adapter=open_adapter(path).stacked()[0], optimizer={}, step=0)


def _train_start(plan: ExecutionPlan, rows: ReadRows, held_out: ReadRows | None) -> dict[str, Any]:
    spec = plan.contract.training
    return {
        "telemetry_schema": TELEMETRY_SCHEMA,
        "execution_kernel": plan.execution_kernel,
        "runbook_kernel": plan.runbook_kernel,
        "candle_compat_mode": plan.candle_compat_mode,
        "contract_digest": plan.contract_digest,
        "backend": plan.backend,
        "compute_device": plan.device,
        "dtype": plan.dtype,
        "base_model": plan.model_name,
        "tokenizer_mode": plan.tokenizer,
        "seed": spec.seed,
        "grad_accum": spec.grad_accum,
        "epochs": spec.epochs,
        "planned_steps_total": total_steps(Batching.of(plan.contract).steps(rows.rows.lengths), spec),
        "pairs_loaded": len(rows.rows),
        "held_out_rows": len(held_out.rows) if held_out else 0,
        "estimate": plan.estimate(),
        "warnings": list(plan.warnings),
        **rows.counters(),
    }


def _preflight(plan: ExecutionPlan) -> dict[str, Any]:
    return {
        "schema_version": "vox.mens.preflight.v0",
        "contract_digest": plan.contract_digest,
        "execution_kernel": plan.execution_kernel,
        "checks": [attrs.asdict(verdict) for verdict in (*plan.gates, *plan.preflight)],
        "notes": list(plan.warnings),
    }


def _parity(path: Path, certificate: Mapping[str, Any]) -> dict[str, Any]:
    held = {name: certificate[name] for name in ("passed", "comparisons", "failed")}
    return {"file": path.name, "sha256": sha256_file(path), **held}


def _hashes(plan: ExecutionPlan) -> dict[str, Any]:
    shards = read_inventory(plan.model_dir, None).files
    return {**plan.contents, "base_shards": {shard.name: sha256_file(shard) for shard in shards}}
