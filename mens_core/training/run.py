"""One run, from a plan to a complete run directory, in one process or in several that went on from each other.

Everything that can be wrong with the rows is found before the folder is touched. From then on the manifest says
at every moment how far the run has come.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from mens_core.artifacts.adapter import initial_state, write_adapter
from mens_core.artifacts.adapters import open_adapter
from mens_core.artifacts.checkpoints import read_checkpoint
from mens_core.artifacts.files import sha256_file, write_json, write_text
from mens_core.artifacts.manifest import Manifest
from mens_core.artifacts.model_card import model_card
from mens_core.artifacts.rundir import RunDirectory
from mens_core.backend import Backend
from mens_core.errors import RunInterrupted, TrainingError
from mens_core.exchange import TrainingState
from mens_core.hf.inventory import read_inventory
from mens_core.plan import ExecutionPlan
from mens_core.text.encode import Encoder, open_encoder
from mens_core.text.pack import Batching, total_steps
from mens_core.training.accuracy import beside_measured
from mens_core.training.between import BetweenSteps, Stop
from mens_core.training.data import ReadRows, check_enough, load_rows
from mens_core.training.faults import explained
from mens_core.training.guards.after import eval_loss_not_worse
from mens_core.training.guards.during import StepGuards
from mens_core.training.guards.gate import Gate
from mens_core.training.guards.verdict import Judge
from mens_core.training.loop import train
from mens_core.training.memory import peak_memory_bytes
from mens_core.training.progress import Progress, perplexity
from mens_core.training.result import RunResult, finished_result, result_of
from mens_core.training.resume import Found, begun_with, check_same_run, find_checkpoint, goes_on, refuse_complete
from mens_core.training.saver import Saver
from mens_core.training.telemetry import TELEMETRY_SCHEMA, Observer, Telemetry, rewind

__all__ = ["run_plan"]


def run_plan(
    plan: ExecutionPlan,
    backend: Backend,
    observers: Sequence[Observer],
    certificate: Mapping[str, Any] | None = None,
    stop: Stop = lambda: None,
) -> RunResult:
    """Train as planned.

    Args:
        plan: from the planner.
        backend: the one the plan chose.
        observers: called with every telemetry event, after the plugins' own.
        certificate: of parity, which the run keeps; None if none was asked for.
        stop: whether the run is told to stop.

    Raises:
        DataError: a row is malformed, too many are too long, or none is left; nothing has been written then.
        RunDirectoryError: the output folder cannot be used.
        ResumeError: the checkpoint is damaged, or of another run; nothing has been written then.
        TrainingError: the run was stopped; the manifest says ``failed`` and why.
        RunInterrupted: the run was told to stop; the manifest says ``interrupted``.
        KeyboardInterrupt: passed on; the manifest says ``interrupted``.
    """
    began = time.monotonic()
    encoder = open_encoder(plan.tokenizer, plan.tokenizer_file, plan.model_dir, plan.layout)
    rows, held_out = _read_data(plan, encoder, observers)
    with RunDirectory.claim(plan.contract.output, goes_on=goes_on(plan)) as folder:
        finished = finished_result(plan, folder)
        if finished is not None:
            return finished
        hashes = _hashes(plan)
        origin = begun_with(plan, hashes, rows.counters(), _steps(plan, rows))
        found = find_checkpoint(plan, folder)
        notes = () if found.checkpoint is None else check_same_run(plan, found.checkpoint, origin)
        earlier = folder.earlier()
        if found.checkpoint is None:
            refuse_complete(folder)
            folder.clear()
        run = _Run(plan, backend, encoder, rows, held_out, folder, found, notes, origin, stop, began)
        manifest = Manifest(
            folder.manifest, plan, backend.plugin, earlier, found.checkpoint.step if found.checkpoint else 0
        )
        try:
            return _run(run, manifest, observers, certificate, hashes)
        except BaseException as error:
            clear = explained(error)
            _close(manifest, error if clear is None else clear)
            if clear is None:
                raise
            raise clear from error


@attrs.frozen
class _Run:
    """What is settled before the first step."""

    plan: ExecutionPlan
    backend: Backend
    encoder: Encoder
    rows: ReadRows
    held_out: ReadRows | None
    folder: RunDirectory
    found: Found
    notes: tuple[str, ...]
    origin: Mapping[str, Any]
    stop: Stop
    began: float


def _run(
    run: _Run,
    manifest: Manifest,
    observers: Sequence[Observer],
    certificate: Mapping[str, Any] | None,
    hashes: Mapping[str, Any],
) -> RunResult:
    plan, folder, checkpoint = run.plan, run.folder, run.found.checkpoint
    write_json(folder.preflight, _preflight(plan))
    if certificate is not None:
        write_json(folder.parity, certificate)
        manifest.update(parity=_parity(folder.parity, certificate))
    manifest.update(
        status="running",
        counters=run.rows.counters(),
        lengths=run.rows.ledger.as_dict(),
        sha256=hashes,
        resumed_from=None
        if checkpoint is None
        else {"step": checkpoint.step, "path": str(checkpoint.path), "notes": list(run.notes)},
        checkpoints_passed_over=list(run.found.passed_over),
    )
    taken_back = 0 if checkpoint is None else rewind(folder.telemetry, checkpoint.step)
    with Telemetry(folder.telemetry, [run.backend.event, *observers]) as telemetry:
        telemetry.emit("train_start", _train_start(run))
        if checkpoint is not None or run.found.passed_over:
            telemetry.emit("train_resume", _train_resume(run, manifest, taken_back))
        try:
            results, progress = _train(run, telemetry, Judge(manifest, telemetry))
        except RunInterrupted as interrupted:
            told = {"reason": interrupted.reason, "step": interrupted.step, "path": str(interrupted.checkpoint)}
            telemetry.emit("train_interrupted", told)
            raise
    files = {file.name: sha256_file(file) for file in folder.written()}
    manifest.finish(
        "complete",
        results=results,
        estimate=_estimate(plan, results),
        sha256={**hashes, "run_files": files},
    )
    return result_of(folder, manifest.fields, tuple(progress.losses), checkpoint.path if checkpoint else None)


def _close(manifest: Manifest, error: BaseException) -> None:
    """Let the manifest say how the run ended; what ended it is not hidden by a disk that refuses that, too."""
    try:
        if isinstance(error, RunInterrupted):
            manifest.finish("interrupted", reason=error.reason, step=error.step)
        elif isinstance(error, KeyboardInterrupt):
            manifest.finish("interrupted", reason=str(error) or "SIGINT")
        else:
            manifest.finish("failed", error=f"{type(error).__name__}: {error}")
    except OSError as refused:
        error.add_note(f"the manifest could not be written either, and still says running: {refused}")


def _estimate(plan: ExecutionPlan, results: Mapping[str, Any]) -> dict[str, Any]:
    return beside_measured(
        plan,
        peak_memory_bytes=results["peak_memory_bytes"],
        seconds_per_step=results["median_step_seconds"],
        tokens_per_step=results["tokens_trained"] / (results["optimizer_steps"] + results["windows_skipped"]),
    )


def _read_data(
    plan: ExecutionPlan, encoder: Encoder, observers: Sequence[Observer]
) -> tuple[ReadRows, ReadRows | None]:
    assert plan.train_file is not None, "a plan to train has rows"

    def news(rows: int) -> None:
        # The run has no folder yet, and so no telemetry.
        for observer in observers:
            observer({"event": "rows_read", "payload": {"rows": rows}})

    rows = load_rows(plan.train_file, plan.contents["train.jsonl"], plan.contract, encoder, news=news)
    check_enough(plan.train_file, rows, plan.contract.data.min_rows)
    if plan.eval_file is None:
        return rows, None
    return rows, load_rows(plan.eval_file, plan.contents["eval.jsonl"], plan.contract, encoder, news=news)


def _train(run: _Run, telemetry: Telemetry, judge: Judge) -> tuple[dict[str, Any], Progress]:
    plan, backend, checkpoint = run.plan, run.backend, run.found.checkpoint
    spec, batching = plan.contract.training, Batching.of(plan.contract)
    gate = Gate(plan=plan, backend=backend, judge=judge, rows=run.rows.rows)
    gate.rows_are_fit(run.encoder)
    session = backend.open(plan, batching.shape(run.rows.rows, spec.epochs))
    opened = backend.state(session)
    start = _start(plan, opened)
    session = gate.begin(session, opened, start)
    if checkpoint is not None:
        session = backend.restore(session, checkpoint.state)
    progress = Progress() if checkpoint is None else Progress.of(checkpoint)
    with Saver(
        run.folder.checkpoints, plan.contract.checkpoint.keep_checkpoints, telemetry, list(run.found.whole)
    ) as saver:
        between = BetweenSteps(
            backend=backend,
            session=session,
            contract=plan.contract,
            held_out=None if run.held_out is None else run.held_out.rows,
            progress=progress,
            telemetry=telemetry,
            saver=saver,
            stop=run.stop,
            total=_steps(plan, run.rows),
            per_epoch=batching.steps(run.rows.rows),
            began=run.began,
            origin=run.origin,
        )
        if checkpoint is None:
            between.measure(0)
        # Asked once before the first step, so that whoever stops the run knows that it listens.
        run.stop()
        steps = StepGuards(progress, spec.on_non_finite, between.total, judge)
        if not between.stops_early():
            train(backend, session, run.rows.rows, plan.contract, telemetry, progress, between, steps)
        steps.close()
        saver.finish()
    session, end, step = _final(run, between, session)
    judge.record(eval_loss_not_worse(progress.evaluations.get(0), progress.evaluations.get(step)))
    session = gate.end(session, start, end)
    write_adapter(run.folder.path, end.adapter, plan)
    gate.written(session, end, run.folder.path)
    results = run.rows.counters() | _results(run, between, step)
    parameters = sum(tensor.size for tensor in end.adapter.values())
    card = model_card(plan, tensors=tuple(end.adapter), parameters=parameters, results=results)
    write_text(run.folder.model_card, card)
    telemetry.emit(
        "train_complete",
        {"ok": True, "execution_kernel": plan.execution_kernel, "output_dir": str(run.folder.path), **results},
    )
    return results, progress


def _final(run: _Run, between: BetweenSteps, session: Any) -> tuple[Any, TrainingState, int]:
    """The adapter that the run gives: of the last step, or with early stopping of the lowest held-out loss.

    Returns:
        (the session that holds it; the adapter, without its moments; after which window it was so).

    Raises:
        TrainingError: if that one's checkpoint is not there any more.
    """
    spec = run.plan.contract.training
    best = between.progress.best(spec.early_stopping_min_delta)
    if spec.early_stopping_patience is None or best is None or best.step == between.progress.steps:
        return session, attrs.evolve(run.backend.state(session), optimizer={}), between.progress.steps
    path = between.best_path()
    if path is None:
        raise TrainingError(
            f"the checkpoint of the lowest held-out loss, after step {best.step}, has gone",
            where=run.folder.checkpoints,
            fix="go on from an earlier one with --resume auto",
        )
    state = attrs.evolve(read_checkpoint(path).state, optimizer={})
    return run.backend.restore(session, state), state, best.step


def _results(run: _Run, between: BetweenSteps, adapter_step: int) -> dict[str, Any]:
    """What the manifest says of the whole run, however many processes it took."""
    progress, spec = between.progress, run.plan.contract.training
    best, path = progress.best(spec.early_stopping_min_delta), between.best_path()
    results: dict[str, Any] = {}
    if run.held_out is not None:
        before, after = progress.evaluations[0], progress.evaluations[adapter_step]
        results = {
            "eval_loss_before": before,
            "eval_loss_after": after,
            "eval_perplexity_before": perplexity(before),
            "eval_perplexity_after": perplexity(after),
            "eval_losses": [[step, loss] for step, loss in progress.evaluations.items()],
            "eval_counters": run.held_out.counters(),
        }
    return results | {
        **progress.summary(),
        "adapter_step": adapter_step,
        "best_step": None if best is None else best.step,
        "best_checkpoint": None if path is None else str(path.relative_to(run.folder.path)),
        "stopped_early": progress.steps < between.total,
        "wall_seconds": progress.wall_seconds + time.monotonic() - run.began,
        "peak_memory_bytes": max(progress.peak_memory_bytes, peak_memory_bytes()),
    }


def _steps(plan: ExecutionPlan, rows: ReadRows) -> int:
    return total_steps(Batching.of(plan.contract).steps(rows.rows), plan.contract.training)


def _start(plan: ExecutionPlan, opened: TrainingState) -> TrainingState:
    """The adapter to begin with: a new one, or the one that the run goes on from."""
    path = plan.contract.adapter.start_from
    if path is None:
        return initial_state(opened.adapter, plan.contract.training.seed)
    return TrainingState(adapter=open_adapter(path).trained(), optimizer={}, step=0)


def _train_start(run: _Run) -> dict[str, Any]:
    plan, rows, held_out = run.plan, run.rows, run.held_out
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
        "planned_steps_total": _steps(plan, rows),
        "pairs_loaded": len(rows.rows),
        "held_out_rows": len(held_out.rows) if held_out else 0,
        "estimate": plan.estimate(),
        "warnings": list(plan.warnings),
        **rows.counters(),
    }


def _train_resume(run: _Run, manifest: Manifest, taken_back: int) -> dict[str, Any]:
    checkpoint = run.found.checkpoint
    return {
        "step": 0 if checkpoint is None else checkpoint.step,
        "path": None if checkpoint is None else str(checkpoint.path),
        "interruptions": [entry["reason"] for entry in manifest.fields["interruptions"]],
        "passed_over": list(run.found.passed_over),
        "notes": list(run.notes),
        "lines_taken_back": taken_back,
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
