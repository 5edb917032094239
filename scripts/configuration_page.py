"""Write docs/configuration.md from the contract's fields: python scripts/configuration_page.py."""

from __future__ import annotations

from pathlib import Path

import attrs

from mens_core.contract import SECTIONS

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"

_HEAD = """# Configuration

Every field of a run, as `--config` reads it (flat, or under its section), as a flag, and as an argument of
`Planner().plan` and `Planner().run`. Later wins: defaults, the preset that the file names, the file, `--preset`, flags.
This page is written by `scripts/configuration_page.py` from the fields themselves.
"""


def page() -> str:
    """The page as text."""
    parts = [_HEAD]
    for section, spec in SECTIONS.items():
        parts.append(f"\n## {section}\n\n{(spec.__doc__ or '').splitlines()[0]}\n")
        parts.append("| field | flag | default | |\n|---|---|---|---|")
        parts += [_row(field) for field in attrs.fields(spec)]
    return "\n".join(parts) + "\n"


def _row(field: attrs.Attribute[object]) -> str:
    flag = field.metadata.get("flag", f"--{field.name.replace('_', '-')}")
    default = "required" if field.metadata.get("required") else _default(field.default)
    notes = [str(field.metadata[name]) for name in ("unit", "evidence") if name in field.metadata]
    choices = field.metadata.get("choices")
    text = str(field.metadata["help"]) + (f" One of {', '.join(choices)}." if choices else "")
    text += f" ({'; '.join(notes)})" if notes else ""
    return f"| `{field.name}` | `{flag}` | {default} | {text.replace('|', '&#124;')} |"


def _default(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, tuple):
        return ",".join(value)
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
