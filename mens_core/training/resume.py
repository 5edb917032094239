"""Going on: which checkpoint a run goes on from, and whether it is of the run that is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from mens_core.artifacts.checkpoints import (
    COMPLETE,
    Checkpoint,
    check_checkpoint,
    checkpoint_folders,
    checkpoint_name,
    read_checkpoint,
)
from mens_core.artifacts.manifest import installed_versions
from mens_core.artifacts.rundir import CHECKPOINTS, RunDirectory
from mens_core.contract import contract_fields
from mens_core.errors import ResumeError, RunDirectoryError
from mens_core.plan import ExecutionPlan
from mens_core.training.progress import Progress
from mens_core.training.schedule import warmup_for

__all__ = ["Found", "begun_with", "check_same_run", "find_checkpoint", "goes_on", "refuse_complete"]

# These leave every step to come the same, but for rounding where another backend takes it: what a run is called,
# what only refuses, and what only measures or ends.
_HARMLESS = {
    "base_family",
    "upstream_model_id",
    "license_class",
    "attribution_required",
    "adapter_tag",
    "deployment_target",
    "min_rows",
    "max_skip_rate",
    "qlora_require_full_proxy_stack",
    "qlora_allow_partial_proxy_stack",
    "eval_every",
    "early_stopping_patience",
    "early_stopping_min_delta",
    "on_non_finite",
    "gradient_checkpointing",
}
# Of these the contract may say auto, or nothing; what counts is what the plan came to.
_DECIDED = {"backend", "device", "dtype", "tokenizer", "base_quant", "warmup_steps"}
_HARMLESS_DECISIONS = {"backend", "device"}
_LENGTHS, _WINDOWS = {"epochs", "max_steps", "total_steps"}, {"batch_size", "grad_accum"}


@attrs.frozen(kw_only=True)
class Found:
    """What there is to go on from.

    Attributes:
        checkpoint: the one that is taken; None if there is none.
        whole: steps of the checkpoints in the run's own folder up to it that are whole.
        passed_over: newer ones that are damaged, and what is wrong with each.
    """

    checkpoint: Checkpoint | None = None
    whole: tuple[int, ...] = ()
    passed_over: tuple[str, ...] = ()


def goes_on(plan: ExecutionPlan) -> bool:
    """Whether a run in the output folder is to be gone on with."""
    asked, output = plan.contract.checkpoint.resume, plan.contract.output.output_dir
    if asked in {"auto", "never"} or output is None:
        return asked == "auto"
    return Path(asked).resolve().is_relative_to(output.resolve())


def begun_with(plan: ExecutionPlan, hashes: Mapping[str, Any], rows: Mapping[str, int], steps: int) -> dict[str, Any]:
    """All that decides a run's steps, for state.json.

    Args:
        plan: of the run.
        hashes: of every file that was read.
        rows: what was counted when they were read.
        steps: of the whole run.
    """
    contract = plan.contract
    decided = {
        "backend": plan.backend,
        "device": plan.device,
        "dtype": plan.dtype,
        "tokenizer": plan.tokenizer,
        "warmup_steps": warmup_for(steps, contract.training.warmup_steps),
        "total_steps": steps,
    }
    digested = {field.name for _, field in contract_fields() if field.metadata["digest"]}
    fields = {name: value for name, value in contract.as_fields().items() if name in digested - _DECIDED}
    return {
        "contract_digest": plan.contract_digest,
        "execution_kernel": plan.execution_kernel,
        "fields": {name: _ordered(value) for name, value in fields.items()},
        "decided": decided,
        "sha256": dict(hashes),
        "rows": dict(rows),
        "versions": installed_versions(),
    }


def find_checkpoint(plan: ExecutionPlan, folder: RunDirectory) -> Found:
    """The checkpoint that the contract asks for.

    Raises:
        ResumeError: if a path was given and there is none, or that one is damaged.
    """
    asked, own = plan.contract.checkpoint.resume, folder.checkpoints
    needs_best = plan.contract.training.early_stopping_patience is not None
    if asked == "never":
        return Found()
    if asked == "auto":
        return _newest(own, needs_best=needs_best)
    path = Path(asked)
    if (path / CHECKPOINTS).is_dir():
        found = _newest(path / CHECKPOINTS, needs_best=needs_best)
    elif path.is_dir():
        found = Found(checkpoint=_with_best(path, needs_best=needs_best))
    else:
        raise ResumeError(
            "there is no such checkpoint",
            where=path,
            expected=f"the folder of a checkpoint, with {COMPLETE} in it, or that of a run",
        )
    if found.checkpoint is None:
        raise ResumeError("the run has no checkpoint that is whole", where="; ".join([str(path), *found.passed_over]))
    if found.checkpoint.path.resolve().parent == own.resolve():
        return attrs.evolve(found, whole=_whole_before(own, found.checkpoint.step))
    best = found.checkpoint.record.get("best")
    if needs_best and best is not None and best["step"] != found.checkpoint.step:
        raise ResumeError(
            "early stopping may give the adapter of an earlier checkpoint, which another folder would not have",
            where=found.checkpoint.path,
            fix="go on in the run's own folder by --resume auto",
        )
    return attrs.evolve(found, whole=())


def check_same_run(plan: ExecutionPlan, checkpoint: Checkpoint, now: Mapping[str, Any]) -> tuple[str, ...]:
    """Hold a checkpoint to the run that is asked for.

    Returns:
        What differs and may.

    Raises:
        ResumeError: naming every field and file that differs and must not; or only harmless ones do, and
            ``resume_anyway`` does not allow them.
    """
    then = checkpoint.record
    try:
        Progress.of(checkpoint)
        differences = [*_different(then, now)]
        kept = [text for name, text in differences if not _is_harmless(name, then, now)]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ResumeError(f"state.json cannot be read: {error!r}", where=checkpoint.path) from error
    listing = "\n".join(f"  - {text}" for _, text in differences)
    if kept:
        harmful = "\n".join(f"  - {text}" for text in kept)
        raise ResumeError(
            f"this is another run than the one that the checkpoint is of:\n{harmful}",
            where=checkpoint.path,
            fix="ask for what it was begun with, or begin another run in another --output-dir",
        )
    if differences and not plan.contract.checkpoint.resume_anyway:
        raise ResumeError(
            f"the run differs from the one that the checkpoint is of, in what does it no harm:\n{listing}",
            where=checkpoint.path,
            fix="ask for what it was begun with, or allow this by --resume-anyway",
        )
    return (*(text for _, text in differences), *_versions(then["versions"], now["versions"]))


def refuse_complete(folder: RunDirectory) -> None:
    """Refuse to begin where a run is complete.

    Raises:
        RunDirectoryError: if it is.
    """
    earlier = folder.earlier()
    if earlier is not None and earlier["status"] == "complete":
        raise RunDirectoryError(
            "the output folder holds a complete run without a checkpoint to go on from",
            where=folder.path,
            fix="choose another --output-dir, or replace it by --overwrite",
        )


def _newest(home: Path, *, needs_best: bool) -> Found:
    passed_over = []
    for step, path in checkpoint_folders(home).items():
        try:
            checkpoint = _with_best(path, needs_best=needs_best)
        except ResumeError as error:
            passed_over.append(f"{path.name}: {error.what}")
            continue
        return Found(checkpoint=checkpoint, whole=_whole_before(home, step), passed_over=tuple(passed_over))
    return Found(passed_over=tuple(passed_over))


def _with_best(path: Path, *, needs_best: bool) -> Checkpoint:
    """Read a checkpoint; where the run may end with the best one, that has to be whole, too."""
    checkpoint = read_checkpoint(path)
    best = checkpoint.record.get("best")
    if needs_best and best is not None and best["step"] != checkpoint.step:
        check_checkpoint(path.with_name(checkpoint_name(best["step"])))
    return checkpoint


def _whole_before(home: Path, last: int) -> tuple[int, ...]:
    found = []
    for step, path in checkpoint_folders(home).items():
        if step <= last:
            try:
                check_checkpoint(path)
            except ResumeError:
                continue
            found.append(step)
    return tuple(found)


def _different(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for part, what in (("fields", ""), ("decided", ""), ("sha256", "sha256 of "), ("rows", "rows, ")):
        old, new = _flat(then[part]), _flat(now[part])
        for name in {**old, **new}:
            if old.get(name) != new.get(name):
                yield name, f"{what}{name}: {_shown(old.get(name))} then, {_shown(new.get(name))} now"


def _is_harmless(name: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    if name in _HARMLESS | _HARMLESS_DECISIONS:
        return True
    old, new = (side["fields"] | side["decided"] for side in (then, now))
    if name in _LENGTHS:
        # A falling rate falls over the whole run, so that every rate depends on its length.
        return bool(old["schedule"] == new["schedule"] == "constant" and old["warmup_steps"] == new["warmup_steps"])
    if name in _WINDOWS:
        # The same rows share a step; a mask of dropout is a function of the batch, too.
        rows = [side["batch_size"] * side["grad_accum"] for side in (old, new)]
        return bool(rows[0] == rows[1] and new["dropout"] == 0)
    return False


def _versions(then: Mapping[str, str], now: Mapping[str, str]) -> tuple[str, ...]:
    names = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    return tuple(
        f"{name} is {now.get(name, 'gone')}, it was {then.get(name, 'not there')}: last digits may differ"
        for name in names
    )


def _ordered(value: Any) -> Any:
    """Patterns as texts, since their order says which of them counts; no patterns are nothing, as they once were."""
    return [f"{name}={number:g}" for name, number in value.items()] if isinstance(value, dict) and value else value


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Names of nested mappings joined; an empty list is nothing, as it is where a field was not there yet."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= {f"{name}/{inner}": part for inner, part in value.items()} if isinstance(value, dict) else {name: value}
    return {name: value for name, value in flat.items() if value != []}


def _shown(value: Any) -> str:
    if isinstance(value, str) and len(value) == 64:
        return f"{value[:12]}…"
    return "nothing" if value is None else ",".join(value) if isinstance(value, list) else str(value)
