"""What must hold once the commands of a step have run: claims about a run directory, each with what was found.

The same claims are made by the tests of rows 11 and 12.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mens_core.artifacts.adapter import V3_MANIFEST
from mens_core.artifacts.adapters import open_adapter
from mens_core.artifacts.norms import update_norm
from mens_core.artifacts.rundir import MANIFEST, PREFLIGHT
from mens_core.hf.files import read_json
from mens_core.training.telemetry_schema import find_problem
from mens_core.verification import verify_run

__all__ = ["CHECKS", "LEAST_FALL", "MERGED_LOGITS", "Claim", "check_merge", "check_run", "read_telemetry"]

#: What is claimed, whether it holds, what was found.
Claim = tuple[str, bool, str]
Found = tuple[list[Claim], dict[str, Any]]

#: How far the held-out loss must fall, in nats a token. A new adapter is exactly the identity, so a run that changes
#: nothing leaves the loss where it was to the last bit.
LEAST_FALL = 0.05

#: How far a merged model's logits may be from those of base and adapter. Both are float32 forward passes, of logits up
#: to some 30, in which one rounding is 2e-6; a merge that leaves out the adapter is off by whole units.
MERGED_LOGITS = 1e-3

_LABELS = {"lora": "burn_lora", "qlora": "candle_qlora"}
# Fields of a complete manifest that may not be missing or empty.
_NAMED = (
    *("run_id", "created_at", "finished_at", "backend", "backend_plugin", "base_model", "train_file", "eval_file"),
    *("plan", "versions", "counters", "sha256", "results", "estimate", "finetune_contract_digest"),
)


def check_run(folder: Path, method: str) -> Found:
    """Claims about a finished run that had held-out rows.

    Args:
        folder: of the run.
        method: ``lora`` or ``qlora``, by which it was asked for.

    Returns:
        The claims, and the numbers they rest on.

    Raises:
        MensError: if a file of the run cannot be read.
        KeyError: if the manifest lacks what its other fields rest on.
    """
    manifest = read_json(folder / MANIFEST, expected="the manifest of a run")
    results = manifest["results"]
    fall = results["eval_loss_before"] - results["eval_loss_after"]
    norms = [update_norm(pair) for pair in open_adapter(folder).pairs.values()]
    kernel = manifest["execution_kernel"]
    empty = [name for name in _NAMED if not manifest.get(name)]
    claims: list[Claim] = [
        ("the run is complete", manifest["status"] == "complete", manifest["status"]),
        ("its kernel is of the method", kernel == f"{manifest['backend']}_{method}", kernel),
        ("it has the runbook's label", manifest["runbook_kernel"] == _LABELS[method], manifest["runbook_kernel"]),
        ("steps were taken", results["optimizer_steps"] > 0, str(results["optimizer_steps"])),
        (f"the held-out loss fell by {LEAST_FALL}", fall >= LEAST_FALL, f"{fall:.4f}"),
        ("every adapted layer was changed", bool(norms) and min(norms) > 0, f"{len(norms)} layers"),
        ("the manifest is complete", not empty, f"empty: {', '.join(empty) or 'none'}"),
        *_verified(folder),
        *_digests(folder, manifest),
        *_telemetry(folder, manifest, method),
        *_older_description(folder, len(norms)),
    ]
    named = ("optimizer_steps", "eval_loss_before", "eval_loss_after", "first_loss", "last_loss", "train_seconds")
    measured = {"execution_kernel": kernel} | {name: results[name] for name in (*named, "peak_memory_bytes")}
    return claims, measured | {"least_update_norm": min(norms, default=0.0)}


def _verified(folder: Path) -> Iterator[Claim]:
    """Every hash and claim of the manifest, the base's and the run's own files among them."""
    for check in verify_run(folder)["checks"]:
        yield f"verify: {check['what']}", check["state"] == "ok", f"{check['state']}: {check['detail']}"


def _digests(folder: Path, manifest: Mapping[str, Any]) -> Iterator[Claim]:
    """The digest is the plan's, everywhere it is written."""
    digest = manifest["finetune_contract_digest"]
    start = next(event["payload"] for event in read_telemetry(folder) if event["event"] == "train_start")
    preflight = read_json(folder / PREFLIGHT, expected="the checks of a run")
    for where, found in (
        ("the plan", manifest["plan"]["contract_digest"]),
        ("preflight", preflight["contract_digest"]),
        ("telemetry", start["contract_digest"]),
    ):
        yield f"the digest is that of {where}", found == digest, f"{found[:12]}…"


def read_telemetry(folder: Path) -> list[dict[str, Any]]:
    """The events of a run.

    Raises:
        ValueError: if a line is no JSON.
    """
    lines = (folder / "telemetry.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _telemetry(folder: Path, manifest: Mapping[str, Any], method: str) -> Iterator[Claim]:
    lines = read_telemetry(folder)
    problems = [find_problem(line) for line in lines]
    first = next((problem for problem in problems if problem is not None), None)
    yield "every line is what the telemetry schema says", first is None, first or f"{len(lines)} lines"
    events = [line for line, problem in zip(lines, problems, strict=True) if problem is None]
    times = [event["ts_ms"] for event in events]
    yield "time does not go back", all(a <= b for a, b in itertools.pairwise(times)), f"{len(times)} lines"
    start: dict[str, Any] = next((event["payload"] for event in events if event["event"] == "train_start"), {})
    mode = start.get("candle_compat_mode")
    yield "candle_compat_mode is that of the method", mode is (method == "qlora"), str(mode)
    kernel = start.get("execution_kernel")
    yield "telemetry names the kernel", kernel == manifest["execution_kernel"], str(kernel)
    steps = [event["payload"]["step"] for event in events if event["event"] == "step"]
    total = manifest["results"]["optimizer_steps"]
    yield "the first and the last step are there", bool(steps) and (steps[0], steps[-1]) == (1, total), str(steps)
    known = bool(lines) and problems[-1] is None
    last = str(lines[-1]["event"]) if known else "nothing that the schema knows"
    ended = last == "train_complete" and lines[-1]["payload"]["ok"] is True
    yield "the last event is a good end", ended, last


def _older_description(folder: Path, layers: int) -> Iterator[Claim]:
    found = read_json(folder / V3_MANIFEST, expected="the description of the adapter")
    written = (found.get("format"), found.get("version"))
    yield f"{V3_MANIFEST} has version 3", found.get("version") == 3, str(written)
    order, keys = found.get("layer_order", []), found.get("base_key_map", {})
    agrees = len(order) == layers and sorted(order) == sorted(keys)
    yield f"{V3_MANIFEST} names every layer", agrees, f"{len(order)} of {layers}"


def check_merge(folder: Path) -> Found:
    """Claims about a merged model whose merge had rows to compare it on.

    Args:
        folder: of the merged model.

    Raises:
        MensError: if its report cannot be read.
        KeyError: if the report lacks a number.
    """
    report = read_json(folder / "merge_report.json", expected="the report of a merge")
    totals, fidelity = report["totals"], report["fidelity"]
    logits = fidelity.get("max_logit_difference")
    claims: list[Claim] = [
        ("merged is not the base", totals["changed"] > 0, f"{totals['changed']} weights"),
        (
            "merged has the logits of base and adapter",
            logits is not None and logits <= MERGED_LOGITS,
            str(fidelity.get("not_measured", logits)),
        ),
    ]
    return claims, {"relative_update": totals["relative_update"], "max_logit_difference": logits}


def _row(method: str) -> Callable[[Path, Sequence[str]], Found]:
    """A row's run, verified, merged, and asked something; the last command's words are the answer."""

    def check(folder: Path, outputs: Sequence[str]) -> Found:
        claims, measured = check_run(folder / "run", method)
        merged, merged_measured = check_merge(folder / "merged")
        answered: Claim = ("the model answers", bool(outputs[-1].strip()), repr(outputs[-1][:40]))
        return [*claims, *merged, answered], measured | merged_measured

    return check


#: What a step of commands is checked by: given its working folder and what each command printed.
CHECKS: dict[str, Callable[[Path, Sequence[str]], Found]] = {"lora_row": _row("lora"), "qlora_row": _row("qlora")}
