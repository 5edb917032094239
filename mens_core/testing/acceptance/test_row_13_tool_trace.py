"""Row 13's corpus part: what was mixed is what is trained on, tool traces included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mens_core import Planner, mix
from mens_core.corpus.rows import read_rows


def test_tool_trace_rows_of_the_packages_mix_reach_training(tmp_path: Path, record_property: Any) -> None:
    mixed = mix(output=tmp_path / "data/train.jsonl")
    traces = sum(row.metadata["category"] == "tool_trace" for row in read_rows(mixed.output))
    record_property("rows", mixed.rows)
    record_property("rows of tool traces", traces)
    assert traces > 0
    fields: dict[str, Any] = {"backend": "torch", "rank": 2, "max_steps": 1, "warmup_steps": 0}
    fields |= {"batch_size": 1, "grad_accum": 1}

    def trained_on(**chosen: Any) -> int:
        name = "-".join(["run", *chosen.values()])
        result = Planner().run(data_dir=tmp_path / "data", output_dir=tmp_path / name, **fields, **chosen)
        manifest = json.loads((result.output_dir / "training_manifest.json").read_text(encoding="utf-8"))
        assert manifest["results"]["optimizer_steps"] == 1
        return int(manifest["results"]["rows"])

    assert trained_on() == mixed.rows
    # The twin: where only tool traces are trained on, the others are missing.
    assert trained_on(context_filter="tool_trace") == traces < mixed.rows
