"""The only place that prints: results as text for people, with nothing in them that steers a terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mens_core.errors import harmless
from mens_core.sizes import written_size

__all__ = [
    "complain",
    "duration",
    "evaluation_text",
    "lengths_lines",
    "memory_beside_plan",
    "merge_text",
    "parity_text",
    "run_summary",
    "say",
    "speak",
    "status_text",
    "table",
    "trend",
]

_CHATS = {"chatml": "ChatML", "template": "the model's own chat template"}


def say(text: str, *, as_it_is: bool = False) -> None:
    """Print to standard output.

    Args:
        text: names and rows in it are foreign, so that what steers a terminal is escaped; unless
        as_it_is: whoever made the text has seen to it, or nobody's terminal is listening.
    """
    sys.stdout.write((text if as_it_is else harmless(text)) + "\n")
    sys.stdout.flush()


def speak(text: str) -> None:
    """Print a piece of an answer, at once; as it is where no terminal listens."""
    sys.stdout.write(harmless(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def complain(text: str) -> None:
    """Print to standard error, with what steers a terminal escaped."""
    sys.stderr.write(harmless(text) + "\n")
    sys.stderr.flush()


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Align columns; the last one is not padded."""
    lines = [tuple(header), *(tuple(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join("  ".join(cells).rstrip() for cells in padded)


def plan_text(plan: Mapping[str, Any]) -> str:
    """A plan for people: what runs, on what, how much of it, what it needs, what was checked."""
    contract, work = plan["contract"], plan["workload"]
    batch, share = work["tokens"] / work["batches"], work["supervised"] / work["tokens"]
    at_most = f", at most {contract['max_steps']}" if contract["max_steps"] else ""
    checks = [*plan["gates"], *plan["preflight"]]
    passed = sum(check["passed"] for check in checks)
    facts = [
        ("kernel", f"{plan['execution_kernel']} on {plan['device']} in {plan['dtype']}; {plan['runbook_kernel']}"),
        ("base", f"{plan['model']}: {plan['model_type']}, {plan['parameters']:,} parameters"),
        ("adapter", f"rank {contract['rank']}, alpha {contract['alpha']:g}, on {', '.join(contract['targets'])}"),
        *(
            (what, ", ".join(f"{name} {number:g}" for name, number in contract[field].items()))
            for what, field in (("ranks", "rank_pattern"), ("alphas", "alpha_pattern"))
            if contract[field]
        ),
        ("text", f"{_CHATS[plan['chat']]}; {contract['supervise']} supervised"),
        ("rows", f"{work['rows']:,}, {batch:,.0f} tokens a batch, {share:.0%} supervised, by {work['source']}"),
        ("run", f"{work['steps']:,} steps of {work['batches']:.3g} batches, {contract['epochs']} epochs{at_most}"),
        ("memory", _memory(plan)),
        ("time", _time(plan)),
        *(("length", text) for text in lengths_lines(plan["lengths"])),
        ("digest", plan["contract_digest"]),
        ("checks", f"{passed} of {len(checks)} hold"),
        *(("refused", f"[{check['code']}] not so: {check['message']}") for check in checks if not check["passed"]),
        *(("warning", warning) for warning in plan["warnings"]),
    ]
    lines = [f"{label:<9}{text}" for label, text in facts]
    if len(plan["offers"]) > 1:
        lines += ["", _offers_table(plan["offers"])]
    return "\n".join([*lines, "", table(("not taken", "why"), list(plan["not_taken"].items()))])


def parity_text(part: Mapping[str, Any]) -> str:
    """A certificate's part on one model for people: who took part, every comparison, the verdict."""
    kernels = [f"{name} on {found['device']} in {found['dtype']}" for name, found in part["kernels"].items()]
    lines = [f"{part['model']}: {part['model_type']}, {part['parameters']:,} parameters; {', '.join(kernels)}"]
    lines += [f"note: {note}" for note in part["notes"]]
    header = ("what", "left", "right", "numbers", "largest error", "mean", "bound", "of", "ulps", "verdict")
    failed = sum(not found["passed"] for found in part["comparisons"])
    verdict = f"{failed} do not" if failed else "all hold"
    rows = [
        (
            found["what"],
            found["left"],
            found["right"],
            found["shape"],
            *(_small(found[key]) for key in ("max_error", "mean_error", "tolerance")),
            found["unit"],
            "" if found["ulps"] is None else f"{found['ulps']:.3g}",
            "holds" if found["passed"] else "FAILS",
        )
        for found in part["comparisons"]
    ]
    return "\n".join([*lines, table(header, rows), f"{len(rows)} comparisons, {verdict}"])


def _small(error: float | None) -> str:
    return "no number" if error is None else f"{error:.1e}" if error else "0"


def lengths_lines(lengths: Mapping[str, Any]) -> list[str]:
    """What the length of the rows costs, a line a source; none where it costs nothing."""
    return [
        f"{source}: " + ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in loss.items())
        for source, loss in lengths["by_source"].items()
    ]


def origins_text(plan: Mapping[str, Any]) -> str:
    """Every value of a plan and where it comes from."""
    values = plan["contract"] | plan["decided"]
    rows = [(name, _value(values[name]), origin) for name, origin in plan["origins"].items()]
    return table(("field", "value", "from"), rows)


def doctor_text(found: Mapping[str, Any]) -> str:
    """What an examination of this installation found."""
    drivers = ", ".join(found["accelerator_drivers"]) or "none"
    lines = [
        f"python     {found['python']} on {found['platform']}",
        f"processor  {found['processor']}, {_many(found['processors'], 'processor')} usable",
        f"memory     {written_size(found['memory_bytes'])}",
        f"drivers    of accelerators: {drivers}",
        "",
        table(("package", "version"), [(name, version or "-") for name, version in found["packages"].items()]),
        "",
        table(("kernel", "state"), [(name, _kernel_state(state)) for name, state in found["kernels"].items()]),
        "",
        *(f"speed      {key}: {source}" for key, source in found["speeds"].items()),
        *(
            []
            if found["speeds"]
            else ["speed      not measured here; measure with: python -m mens_core doctor --measure"]
        ),
        "",
        table(
            ("variable", "value", "meaning"),
            [(name, entry["value"] or "-", entry["meaning"]) for name, entry in found["variables"].items()],
        ),
    ]
    return "\n".join(lines)


def _planned(estimate: Mapping[str, Mapping[str, Any]]) -> str:
    """How well the plan guessed; empty if it did not guess."""
    memory, pace = estimate["peak_memory_bytes"], estimate["seconds_per_step"]
    parts = []
    if memory["error"] is not None:
        parts.append(f"{written_size(memory['estimated'])}, measured {memory['error']:+.0%}")
    if pace["error"] is not None:
        parts.append(f"{pace['estimated']:.3g} s a step, measured {pace['error']:+.0%}")
    return "; ".join(parts)


def _memory(plan: Mapping[str, Any]) -> str:
    parts = next(offer for offer in plan["offers"] if offer["kernel"] == plan["execution_kernel"])["memory"]
    if not parts:
        return f"no estimate; {written_size(plan['limit_bytes'])} may be used"
    shown = {name.replace("_", " "): size for name, size in parts.items() if size >= 2**20}
    listing = ", ".join(f"{name} {written_size(size)}" for name, size in shown.items())
    return f"{written_size(sum(parts.values()))} of {written_size(plan['limit_bytes'])}: {listing}"


def _time(plan: Mapping[str, Any]) -> str:
    offer = next(offer for offer in plan["offers"] if offer["kernel"] == plan["execution_kernel"])
    seconds, speed, total = (plan["estimate"][name] for name in ("seconds_per_step", "tokens_per_sec", "train_seconds"))
    if seconds is None:
        return "no estimate"
    return f"{seconds:.3g} s a step, {speed:,.0f} tokens/s, {duration(total)} in all; {offer['seconds_source']}"


def _offers_table(offers: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (
            offer["kernel"],
            offer["device"] or "-",
            offer["dtype"] or "-",
            written_size(sum(offer["memory"].values())) if offer["memory"] else "-",
            f"{offer['seconds_per_step']:.3g}" if offer["seconds_per_step"] is not None else "-",
            offer["reason"] or offer["seconds_source"],
        )
        for offer in offers
    ]
    return table(("kernel", "device", "format", "memory", "s/step", "remarks"), rows)


def _kernel_state(state: Mapping[str, Any]) -> str:
    if state["ready"]:
        return f"ready on {state['device']} in {state['dtype']}, {written_size(state['device_memory_bytes'])}"
    return f"{state['obstacle']}: {state['fix']}" if state["fix"] else str(state["obstacle"])


def _value(value: object) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _many(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def duration(seconds: float) -> str:
    """Seconds for people, in the unit that fits."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def run_summary(output_dir: Path, manifest: Mapping[str, Any]) -> str:
    """What happened and where everything lies, for the end of a run."""
    results = manifest["results"]
    steps, seconds = results["optimizer_steps"], results["train_seconds"]
    speed, memory = f"{results['tokens_per_sec']:,.0f} tokens/s", written_size(results["peak_memory_bytes"])
    lines = [
        f"trained {steps} steps on {results['rows']:,} rows with {manifest['execution_kernel']} in {seconds:.1f} s",
        f"speed          {speed}, peak memory {memory}",
        f"training loss  {results['first_loss']:.4f} → {results['last_loss']:.4f}",
    ]
    if "eval_loss_before" in results:
        lines.append(f"held-out loss  {results['eval_loss_before']:.4f} → {results['eval_loss_after']:.4f}")
    if results["adapter_step"] != steps:
        lines.append(f"adapter of     step {results['adapter_step']}, which has the lowest held-out loss")
    lines += [f"planned        {text}" for text in [_planned(manifest["estimate"])] if text]
    dropped = {name: results[name] for name in results if name.startswith("rows_") and results[name]}
    lines += [f"{name.replace('_', ' ')}: {count}" for name, count in dropped.items()]
    lines += [f"length         {text}" for text in lengths_lines(manifest["lengths"])]
    lines += [
        f"adapter        {output_dir / 'adapter_model.safetensors'}",
        f"manifest       {output_dir / 'training_manifest.json'}",
        f"telemetry      {output_dir / 'telemetry.jsonl'}",
        f"model card     {output_dir / 'MODEL_CARD.md'}",
    ]
    return "\n".join(lines)


def merge_text(output: Path, merged: Mapping[str, Any]) -> str:
    """What was merged into what, and how exactly."""
    totals = merged["totals"]
    lines = [
        f"merged {totals['merged']} tensors onto {merged['onto']} in {merged['seconds']:.1f} s",
        f"update         {totals['relative_update']:.2e} of the weights' norm",
        f"changed        {totals['changed']:,} of {totals['elements']:,} weights; {totals['copied']} tensors as before",
        f"rounding       {totals['relative_rounding']:.2e} of the update's norm (weights {merged['dtype']})",
    ]
    if merged["head_untied"]:
        lines.append("head           now a tensor of its own: config.json says tie_word_embeddings false")
    fidelity = merged.get("fidelity")
    if fidelity and "not_measured" in fidelity:
        lines.append(f"fidelity       not measured: {fidelity['not_measured']}")
    elif fidelity:
        lines += [
            f"logits         {fidelity['max_logit_difference']:.2e} from base + adapter at most, on held-out rows",
            f"predictions    {fidelity['mean_divergence']:.2e} nats apart, {fidelity['top1_agreement']:.2%} the same",
            f"held-out loss  {fidelity['loss_adapted']:.4f} with the adapter, {fidelity['loss_merged']:.4f} merged",
        ]
    lines += [f"note           {note}" for note in merged["notes"]]
    return "\n".join([*lines, f"model          {output}"])


def evaluation_text(found: Mapping[str, Any]) -> str:
    """How well a model says what it should."""
    model = found["model"] + (f" with {found['adapter']}" if found["adapter"] else "")
    return "\n".join(
        [
            f"loss           {found['loss']:.4f} nats a token, perplexity {found['perplexity']:.4g}",
            f"rows           {found['rows']:,}; {found['supervised_tokens']:,} of {found['tokens']:,} tokens count",
            f"model          {model}, computed by {found['execution_kernel']}",
        ]
    )


def trend(losses: Sequence[float]) -> str:
    """Where a loss is heading, as an arrow: the mean of the last steps against that of as many before, by 1 %."""
    few = min(10, len(losses) // 2)
    if few < 3:
        return "→"
    now, before = sum(losses[-few:]) / few, sum(losses[-2 * few : -few]) / few
    return "↘" if now < 0.99 * before else "↗" if now > 1.01 * before else "→"


def memory_beside_plan(peak: int, planned: int | None) -> str:
    """What a run has needed, and of what the plan said it would."""
    return written_size(peak) + (f" of {written_size(planned)}" if planned is not None else "")


def status_text(status: Mapping[str, Any]) -> str:
    """How a run stands, for people."""
    last, start = status["last_step"], status["start"]
    facts = [("run", f"{status['run']}: {status['state']}" + (f", {status['detail']}" if status["detail"] else ""))]
    if start is not None:
        place = f"{start['execution_kernel']} on {start['compute_device']} in {start['dtype']}"
        facts.append(("kernel", f"{place}: {start['base_model']}"))
    if last is not None:
        facts += _step_facts(last, status)
    measured = status["evaluations"]
    facts += [
        ("held-out", f"loss {found['eval_loss']:.4f} after {found['step']} steps")
        for found in measured[:1] + measured[1:][-1:]
    ]
    saved = status["checkpoint"]
    if saved is not None:
        facts.append(("saved", f"step {saved['step']}, {written_size(saved['bytes'])}, in {saved['path']}"))
    facts += _guard_facts(status["guards"])
    facts += [("note", note) for note in status["notes"]]
    facts += [("to do", status["advice"])] if status["advice"] else []
    return "\n".join(f"{label:<10}{text}" for label, text in facts)


def _guard_facts(guards: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """How many guards hold, and what the others found."""
    broken = [guard for guard in guards if not guard["passed"]]
    held = [("guards", f"{len(guards) - len(broken)} of {len(guards)} hold")] if guards else []
    return held + [(guard["severity"], f"[{guard['code']}] {guard['message']}") for guard in broken]


def _step_facts(last: Mapping[str, Any], status: Mapping[str, Any]) -> list[tuple[str, str]]:
    done = f"{last['step']:,} of {last['total_steps']:,}, epoch {last['epoch'] + 1} of {status['start']['epochs']}"
    left = f", {duration(last['eta_seconds'])} left" if status["state"] == "running" else ""
    rate = f"{last['tokens_per_sec']:,.0f} tokens/s, {last['step_seconds']:.3g} s a step"
    return [
        ("step", f"{done}{left}"),
        ("loss", f"{last['loss']:.4f} {trend(status['losses'])}"),
        ("rate", rate),
        ("memory", memory_beside_plan(last["peak_memory_bytes"], status["start"]["estimate"]["peak_memory_bytes"])),
    ]
