"""Write docs/telemetry.md from the shipped schema: python scripts/telemetry_page.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mens_core.training.telemetry_schema import SCHEMA_FILE, telemetry_schema

PAGE = Path(__file__).parents[1] / "docs" / "telemetry.md"

_HEAD = """# Telemetry

A run writes `telemetry.jsonl` into its folder, one event a line:

```json
{{"ts_ms": 1764000000000, "event": "step", "payload": {{"epoch": 0, "step": 1, "loss": 0.65, …}}}}
```

- Every event is handed to the system before anyone else hears of it. One that cannot be written ends the run with an
  error: a record without holes, or none. No line holds NaN.
- A run that ends says how: its last event is `train_complete`, `train_interrupted` or `train_stopped`. One that was
  killed has none of them, and may leave half a line; readers here leave that out and say so, and refuse other faults.
- Nothing leaves the machine. `--report-to tensorboard,wandb,mlflow` shows a run elsewhere as well; each needs its extra
  (`pip install 'mens-core[tensorboard]'`), and none is at work unless asked for. TensorBoard's files lie in
  `RUN/tensorboard`, MLflow's database in `RUN/mlflow` unless `MLFLOW_TRACKING_URI` says otherwise, W&B goes by its own
  variables (`WANDB_MODE=offline` keeps it here). An observer of your own is a callable in the entry points
  `mens_core.observers`: it is given the plan and returns an object with the hook `mens_event`.
- `python -m mens_core status RUN` tells how a run stands, `watch RUN` follows it from another terminal until it ends;
  both read these files alone, and say of a run that died that it did.

The schema is JSON Schema, draft 2020-12, and comes with the package: `{schema}`. It is closed: a field that is not
listed here does not occur. This page is written from it by `scripts/telemetry_page.py`.
"""


def page() -> str:
    """The page as text."""
    schema = telemetry_schema()
    parts = [_HEAD.format(schema=SCHEMA_FILE.relative_to(PAGE.parents[1]))]
    for name in schema["properties"]["event"]["enum"]:
        event = schema["$defs"][name]
        parts.append(f"\n## {name}\n\n{event['description']}\n\n| field | type | |\n|---|---|---|")
        parts += _rows(event, "")
    return "\n".join(parts) + "\n"


def _rows(event: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for name, field in event["properties"].items():
        optional = "" if name in event["required"] else ", may be absent"
        text = field["description"].replace("|", "&#124;")
        yield f"| `{prefix}{name}` | {_kind(field)}{optional} | {text} |"
        yield from _rows(field, f"{prefix}{name}.") if "properties" in field else ()


def _kind(field: Mapping[str, Any]) -> str:
    if "const" in field:
        return f"always {str(field['const']).lower()}"
    if "enum" in field:
        return " or ".join(f"`{word}`" for word in field["enum"])
    kinds = field["type"]
    return " or ".join(kinds) if isinstance(kinds, list) else str(kinds)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
