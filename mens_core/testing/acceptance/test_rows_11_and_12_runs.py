"""Rows 11 and 12 as runs: source code → pairs → a mix with tool traces → train → merge → generate, on every kernel.

The models are tiny and random; what is shown is that every stage did what it says. That a model learns what its data
teach is shown by ``test_skill.py``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mens_core
from mens_core.acceptance.checks import Claim, check_merge, check_run
from mens_core.cli import main
from mens_core.corpus.rows import read_rows
from mens_core.hf.layout import GRAPHS

SETTINGS = {"--max-steps": "12", "--batch-size": "4", "--grad-accum": "1", "--lr": "5e-3", "--seq-len": "320"}


def _hold(claims: list[Claim]) -> None:
    assert claims
    assert not [(what, detail) for what, holds, detail in claims if not holds]


def test_the_corpus_of_the_runs_holds_pairs_and_traces(corpus: Path) -> None:
    categories = [row.metadata["category"] for row in read_rows(corpus / "train.jsonl")]
    assert 0 < categories.count("tool_trace") < len(categories)
    assert (corpus / "eval.jsonl").stat().st_size > 0


# The others are as long together as all other tests; the gate runs them.
_SHORT = {("torch", "lora", "gpt2"), ("jax", "qlora", "qwen2")}


@pytest.mark.parametrize(
    ("backend", "method", "family"),
    [
        pytest.param(*kernel, family, marks=[] if (*kernel, family) in _SHORT else [pytest.mark.long])
        for kernel in (("torch", "lora"), ("torch", "qlora"), ("jax", "lora"), ("jax", "qlora"))
        for family in GRAPHS
    ],
)
def test_a_run_trains_merges_and_answers(
    corpus: Path,
    trainable: Callable[[str], Path],
    tmp_path: Path,
    record_property: Any,
    capsys: pytest.CaptureFixture[str],
    backend: str,
    method: str,
    family: str,
) -> None:
    run, merged = tmp_path / "run", tmp_path / "merged"
    settings = SETTINGS | {"--model": str(trainable(family)), "--data-dir": str(corpus), "--output-dir": str(run)}
    words = [word for pair in settings.items() for word in pair]
    assert main(["train", "--backend", f"{backend}_{method}", "--tokenizer", "hf", *words]) == 0
    claims, measured = check_run(run, method)
    _hold(claims)
    verb, onto = ("merge-qlora", ["--onto", "quantized"]) if method == "qlora" else ("merge-weights", [])
    assert main([verb, "--adapter", str(run), "--output", str(merged), "--backend", backend, *onto]) == 0
    claims, of_merge = check_merge(merged)
    _hold(claims)
    for name, value in (measured | of_merge).items():
        record_property(name, value)
    capsys.readouterr()
    assert main(["generate", "--adapter", str(run), "--prompt", "def f(x):", "--max-new-tokens", "8"]) == 0
    assert capsys.readouterr().out.strip()


def test_a_run_that_changes_nothing_does_not_pass(
    corpus: Path, trainable: Callable[[str], Path], tmp_path: Path
) -> None:
    """The twin: its numbers as a run without effect leaves them, a base that was touched, a line of another shape."""
    fields: dict[str, Any] = {
        "model": str(trainable("llama")),
        "data_dir": corpus,
        "output_dir": tmp_path / "run",
        "seq_len": 320,
    }
    mens_core.Planner().run(**fields, backend="torch_lora", max_steps=1, batch_size=4, grad_accum=1)
    manifest = tmp_path / "run" / "training_manifest.json"
    content = json.loads(manifest.read_text(encoding="utf-8"))
    content["results"]["eval_loss_after"] = content["results"]["eval_loss_before"]
    content["sha256"]["base_shards"] = dict.fromkeys(content["sha256"]["base_shards"], "0" * 64)
    manifest.write_text(json.dumps(content), encoding="utf-8")
    with (tmp_path / "run" / "telemetry.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"ts_ms": 1, "event": "step"}\n{"ts_ms": 2, "event": "step", "payload": {"step": 9}}\n')
    broken = {what for what, holds, _ in check_run(tmp_path / "run", "lora")[0] if not holds}
    assert broken >= {
        "the held-out loss fell by 0.05",
        "verify: base, model.safetensors",
        "every line is what the telemetry schema says",
        "the last event is a good end",
    }
