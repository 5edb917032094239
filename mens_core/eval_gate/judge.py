"""Judge a run by a policy: every gate passes, warns or fails, and a number that is missing fails."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from mens_core.artifacts.files import sha256_file, write_json
from mens_core.artifacts.manifest import utc_now
from mens_core.artifacts.rundir import MANIFEST
from mens_core.errors import DataError, MensError, ModelError
from mens_core.eval_gate.policy import DEFAULT_POLICY, Bound, Policy, Suite, read_policy
from mens_core.evaluation import evaluate_model
from mens_core.generation import Conversation
from mens_core.hf.files import find_file, read_json

__all__ = ["RECEIPT", "judge_run"]

#: The file that a judgement leaves in the run.
RECEIPT = "eval_gate_receipt.json"
_SCHEMA = "mens_eval_gate_receipt_v1"


@attrs.frozen(kw_only=True)
class _Judged:
    """One gate's verdict.

    Attributes:
        gate: its name.
        kind: of its bound.
        bound: that was asked for.
        found: the run's number; None if it has none.
        verdict: ``passed``, ``warned`` or ``failed``.
        block: whether it decides.
        detail: where the number comes from, or why there is none.
    """

    gate: str
    kind: str
    bound: float
    found: float | None
    verdict: str
    block: bool
    detail: str


def judge_run(run: str | Path, *, policy: str | Path | None = None, output: str | Path | None = None) -> dict[str, Any]:
    """Judge a finished run, and write the receipt.

    Args:
        run: its folder.
        policy: YAML file of gates; None for the package's.
        output: of the receipt; None for ``eval_gate_receipt.json`` in the run.

    Returns:
        The receipt: ``run``, ``run_id``, ``policy``, ``policy_sha256``, ``passed``, ``judged_at`` and ``gates``, each
        with ``gate``, ``kind``, ``bound``, ``found``, ``verdict``, ``block`` and ``detail``.

    Raises:
        ContractError: if the policy is wrong.
        ModelError: if there is no manifest of a run.
        DataError: if a suite has no prompt, or one that cannot be read.
    """
    folder, source = Path(run), Path(policy or DEFAULT_POLICY)
    gates = read_policy(source)
    record = find_file(folder, MANIFEST) if folder.is_dir() else None
    if record is None:
        raise ModelError(f"there is no {MANIFEST}", where=folder, expected="the folder of a run")
    manifest = read_json(record, expected="the manifest of a run")
    suites = [(suite, _questions(suite.file)) for suite in gates.suites]
    judged = [*_numbers(folder, manifest, gates), *_contexts(folder, manifest, gates)]
    judged += [_answers(folder, manifest, suite, questions) for suite, questions in suites]
    receipt = {
        "schema": _SCHEMA,
        "run": str(folder),
        "run_id": manifest.get("run_id"),
        "policy": str(source),
        "policy_sha256": sha256_file(source),
        "judged_at": utc_now(),
        "passed": all(gate.verdict != "failed" for gate in judged),
        "gates": [attrs.asdict(gate) for gate in judged],
    }
    write_json(Path(output) if output else folder / RECEIPT, receipt)
    return receipt


def _judged(bound: Bound, found: float | None, detail: str) -> _Judged:
    holds = found is not None and bound.holds(found)
    verdict = "passed" if holds else "failed" if bound.block else "warned"
    return _Judged(
        gate=bound.gate,
        kind=bound.kind,
        bound=bound.value,
        found=found,
        verdict=verdict,
        block=bound.block,
        detail=detail,
    )


def _numbers(folder: Path, manifest: Mapping[str, Any], policy: Policy) -> Iterator[_Judged]:
    """The gates of single numbers; what cannot be computed is missing."""
    for gate, bound in policy.numbers.items():
        try:
            found, detail = _NUMBERS[gate](folder, manifest)
        except (KeyError, TypeError, ValueError, ZeroDivisionError, OSError) as error:
            yield _judged(bound, None, f"the run does not have it: {error!r}")
        else:
            yield _judged(bound, found, detail)


def _supervised_ratio(_: Path, manifest: Mapping[str, Any]) -> tuple[float, str]:
    results = manifest["results"]
    trained, tokens = results["supervised_tokens_trained"], results["tokens_trained"]
    return trained / tokens, f"{trained:,} of {tokens:,} tokens"


def _truncation(_: Path, manifest: Mapping[str, Any]) -> tuple[float, str]:
    counters = manifest["counters"]
    lost = sum(counters[f"rows_{name}"] for name in ("truncated", "split", "dropped_overlong"))
    rows = counters["rows"] + counters["rows_dropped_overlong"]
    return lost / rows, f"{lost:,} of {rows:,} rows"


def _throughput(folder: Path, _: Mapping[str, Any]) -> tuple[float, str]:
    events = [json.loads(line) for line in (folder / "telemetry.jsonl").read_text(encoding="utf-8").splitlines()]
    speeds = [event["payload"]["tokens_per_sec"] for event in events if event["event"] == "step"]
    return statistics.median(speeds), f"median of {len(speeds)} steps"


def _held_out_loss(_: Path, manifest: Mapping[str, Any]) -> tuple[float, str]:
    before, after = (manifest["results"][f"eval_loss_{when}"] for when in ("before", "after"))
    return before - after, f"{before:.4f} → {after:.4f}"


_NUMBERS: dict[str, Callable[[Path, Mapping[str, Any]], tuple[float, str]]] = {
    "supervised_ratio": _supervised_ratio,
    "truncation": _truncation,
    "throughput": _throughput,
    "held_out_loss": _held_out_loss,
}


def _contexts(folder: Path, manifest: Mapping[str, Any], policy: Policy) -> Iterator[_Judged]:
    """The loss on the held-out rows whose category, lane or task family has the context's name in it."""
    for context, bound in policy.contexts.items():
        try:
            if manifest["eval_file"] is None:
                raise DataError("the run had no held-out rows")
            fields = {"backend": manifest["backend"], "seq_len": manifest["seq_len"], "context_filter": context}
            found = evaluate_model(manifest["eval_file"], adapter=folder, **fields)
        except (KeyError, MensError) as error:
            yield _judged(bound, None, f"it cannot be measured: {error}".splitlines()[0])
        else:
            yield _judged(bound, found["loss"], f"{found['rows']} held-out rows")


def _questions(file: Path) -> list[tuple[str, str]]:
    expected = 'a line such as {"prompt": "2 + 2?", "expected": "4"}'
    if not file.is_file():
        raise DataError("there is no such suite of prompts", where=file, expected="a file of JSON lines")
    questions = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"a line is no JSON: {error}", where=f"{file}:{number}", expected=expected) from error
        if not isinstance(row, dict) or set(row) != {"prompt", "expected"} or not all(map(_is_text, row.values())):
            raise DataError("a line is no prompt with its answer", where=f"{file}:{number}", expected=expected)
        questions.append((row["prompt"], row["expected"]))
    if not questions:
        raise DataError("the suite has no prompt", where=file, expected=expected)
    return questions


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _answers(folder: Path, manifest: Mapping[str, Any], suite: Suite, questions: list[tuple[str, str]]) -> _Judged:
    """Ask every prompt by itself; blanks around an answer do not count."""
    try:
        conversation = Conversation(adapter=folder, max_new_tokens=suite.max_new_tokens, backend=manifest["backend"])
        right = 0
        for prompt, expected in questions:
            right += conversation.answer(prompt).strip() == expected.strip()
            conversation.forget()
    except (KeyError, MensError) as error:
        return _judged(suite.bound, None, f"the run's model cannot be asked: {error}".splitlines()[0])
    return _judged(suite.bound, right / len(questions), f"{right} of {len(questions)} prompts")
