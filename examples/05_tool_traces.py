"""Tool calls: a mix with traces, and what was learnt of them.

    python examples/05_tool_traces.py [folder]

Makes traces of three tools, mixes them with code from the standard library, trains, and asks for calls that were not
among them. About a minute on two cores. Expected: the answers after training are JSON objects with a tool's name.
"""

from __future__ import annotations

import json
import sys
import sysconfig
from pathlib import Path

from mens_core import Planner, generate, mix, write_pairs

TOOLS = {"list_files": "List the files in {}.", "read_file": "Show me {}.", "count_lines": "How long is {}?"}
PLACES = ["src", "docs", "tests", "a.py", "b.py", "notes.md", "lib", "bin", "main.c", "data"]
ASKED = ("List the files in lib.", "Show me main.c.")


def main(folder: Path, steps: int = 80) -> list[str]:
    """Mix, train, ask; returns the answers."""
    folder.mkdir(parents=True, exist_ok=True)
    write_pairs([Path(sysconfig.get_path("stdlib")) / "json"], folder / "pairs", max_chars=300, eval_fraction=0.1)
    traces = (
        {
            "task_prompt": question.format(place),
            "tool_name": tool,
            "arguments_json": json.dumps({"path": place}),
            "result_json": json.dumps({"done": True}),
            "success": True,
        }
        for place in PLACES
        for tool, question in TOOLS.items()
        if question.format(place) not in ASKED
    )
    (folder / "traces.jsonl").write_text("".join(f"{json.dumps(trace)}\n" for trace in traces), encoding="utf-8")
    sources = [
        {"path": "traces.jsonl", "weight": 3, "record_format": "tool_trace"},
        {"path": "pairs/train.jsonl", "weight": 1},
    ]
    # JSON is YAML.
    (folder / "mix.yaml").write_text(json.dumps({"sources": sources, "eval_fraction": 0}), encoding="utf-8")
    mixed = mix(folder / "mix.yaml", folder / "corpus/train.jsonl")
    print(f"{mixed.rows} rows")

    result = Planner().run(
        data_dir=folder / "corpus",
        output_dir=folder / "run",
        backend="torch",
        max_steps=steps,
        epochs=40,
        batch_size=8,
        grad_accum=1,
        learning_rate=2e-3,
        seq_len=768,
    )
    # A trace is asked for in the words of the rows, another task in the place of theirs.
    rows = map(json.loads, (folder / "corpus/train.jsonl").read_text(encoding="utf-8").splitlines())
    asked = next(row["prompt"] for row in rows if "Show me notes.md." in row["prompt"])
    answers = []
    for task in ASKED:
        prompt = asked.replace("Show me notes.md.", task)
        answers.append(generate(prompt, adapter=result.adapter_dir, backend="torch", max_new_tokens=120))
        print(f"{task}\n{answers[-1]}")
    print(f"loss {result.losses[0]:.3f} → {result.losses[-1]:.3f}")
    return answers


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else ".demo/05"))
