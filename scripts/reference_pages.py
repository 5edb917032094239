"""Write docs/reference/ and the list of decisions from what they describe: python scripts/reference_pages.py.

The command line from its parsers, the configuration from the contract's fields, hooks and errors from their docstrings,
the manifest from its schema.
"""

from __future__ import annotations

import argparse
import importlib.resources
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from mens_core import errors, exchange, hookspecs
from mens_core.cli import VERBS, _parser
from mens_core.contract import SECTIONS

DOCS = Path(__file__).parents[1] / "docs"

_COMMAND_LINE = """# Command line

`python -m mens_core VERB …`, or `mens VERB …` after an installation. Exit codes: 0 done, 1 what was examined does
not hold, 2 refused with `error: …`, 130 and 143 interrupted. `--debug` shows the trace of an error. This page is
written by `scripts/reference_pages.py` from the parsers.
"""
_CONFIGURATION = """# Configuration

Every field of a run, as `--config` reads it (flat, or under its section), as a flag, and as an argument of
`Planner().plan` and `Planner().run`. Later wins: defaults, the preset that the file names, the file, `--preset`, flags.
This page is written by `scripts/reference_pages.py` from the fields themselves.
"""
_DECISIONS = """# Decisions

One page each: what was decided, what it was weighed against, what follows.
"""
_HOOKS = """# Hooks

What a backend implements, in order of time, and the records that cross; [Writing a
backend](../writing_a_backend.md) leads through them. This page is written by `scripts/reference_pages.py` from
`mens_core/hookspecs.py` and `mens_core/exchange.py`.
"""
_ERRORS = """# Errors

Every error that is raised on purpose is a `MensError`; the command line prints it as `error: …` and exits with 2.
Codes of gates are in [the runbook's page](../runbook.md). This page is written by `scripts/reference_pages.py`
from `mens_core/errors.py`.
"""
_MANIFEST = """# training_manifest.json

What was asked, what was decided, what happened. The file is rewritten atomically and true at every moment:
`status` goes planned → running → complete, or ends as failed or interrupted. This page is written by
`scripts/reference_pages.py` from `mens_core/artifacts/manifest_schema.json`, to which tests hold the manifests of
runs.
"""


def command_line() -> str:
    """Every verb with its flags."""
    parts = [
        _COMMAND_LINE,
        "| verb | what it does |\n|---|---|",
        *(f"| [`{verb}`](#{verb}) | {purpose} |" for verb, purpose in VERBS.items()),
    ]
    for verb in VERBS:
        parts += ["", *_verb(verb, _of_verb(verb), level=2)]
    return "\n".join(parts) + "\n"


def _of_verb(verb: str) -> argparse.ArgumentParser:
    parser = _parser([verb])
    return next(iter(_sub_parsers(parser)))[verb]


def _sub_parsers(parser: argparse.ArgumentParser) -> Iterator[dict[str, argparse.ArgumentParser]]:
    for action in parser._actions:  # noqa: SLF001 (argparse has no public list)
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
            yield dict(action.choices)


def _verb(name: str, parser: argparse.ArgumentParser, level: int) -> list[str]:
    lines = [f"{'#' * level} {name}\n", f"{(parser.description or '').strip()}\n"]
    groups = [(group.title or "", _flags(group)) for group in parser._action_groups]  # noqa: SLF001
    own = [flag for title, flags in groups if title not in SECTIONS for flag in flags]
    if own:
        lines += ["| flag | |\n|---|---|", *map(_flag, own)]
    fields = [f"[{title}](configuration.md#{title})" for title, flags in groups if title in SECTIONS and flags]
    if fields:
        lines += ["", f"And the fields of the contract as flags: {', '.join(fields)}."]
    if parser.epilog:
        lines += ["", "```text", parser.epilog.strip(), "```"]
    for sub_verbs in _sub_parsers(parser):
        for sub_verb, nested in sub_verbs.items():
            lines += ["", *_verb(f"{name} {sub_verb}", nested, level + 1)]
    return lines


def _flags(group: argparse._ArgumentGroup) -> list[argparse.Action]:
    unlisted = argparse._HelpAction | argparse._SubParsersAction  # noqa: SLF001
    return [action for action in group._group_actions if not isinstance(action, unlisted) and action.dest != "debug"]  # noqa: SLF001


def _flag(action: argparse.Action) -> str:
    value = "" if action.nargs == 0 else f" {action.metavar or action.dest.upper()}"
    words = ", ".join(f"`{flag}{value}`" for flag in action.option_strings) or f"`{action.metavar or action.dest}`"
    text = (action.help or "").replace("%%", "%").replace("\n", " ")
    return f"| {_cell(words)} | {_cell(text)} |"


def _cell(text: str) -> str:
    return text.replace("|", "&#124;")


def configuration() -> str:
    """Every field of the contract, by section."""
    parts = [_CONFIGURATION]
    for section, spec in SECTIONS.items():
        parts.append(f"\n## {section}\n\n{(spec.__doc__ or '').splitlines()[0]}\n")
        parts.append("| field | flag | default | |\n|---|---|---|---|")
        parts += [_field(field) for field in attrs.fields(spec)]
    return "\n".join(parts) + "\n"


def _field(field: attrs.Attribute[object]) -> str:
    flag = field.metadata.get("flag", f"--{field.name.replace('_', '-')}")
    default = "required" if field.metadata.get("required") else _default(field.default)
    notes = [str(field.metadata[name]) for name in ("unit", "evidence") if name in field.metadata]
    choices = field.metadata.get("choices")
    text = str(field.metadata["help"]) + (f" One of {', '.join(choices)}." if choices else "")
    text += f" ({'; '.join(notes)})" if notes else ""
    return f"| `{field.name}` | `{flag}` | {default} | {_cell(text)} |"


def _default(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, tuple):
        return ",".join(value)
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


def hooks() -> str:
    """Every hook and every record that crosses one, in order of time."""
    parts = [_HOOKS]
    for name, hook in vars(hookspecs).items():
        if name.startswith("mens_"):
            parts += [f"## {name}\n", f"```py\n{name}{_signature(hook)}\n```\n", _prose(hook), ""]
    parts.append("# Records\n")
    for name in exchange.__all__:
        record = getattr(exchange, name)
        if inspect.isclass(record):
            parts += [f"## {name}\n", _prose(record), ""]
    return "\n".join(parts).rstrip() + "\n"


def _signature(hook: Callable[..., object]) -> str:
    signature = inspect.signature(hook)
    arguments = ", ".join(
        f"{name}: {parameter.annotation}".replace("'", "") for name, parameter in signature.parameters.items()
    )
    return f"({arguments}) -> {signature.return_annotation}".replace("'", "")


def _prose(documented: object) -> str:
    return f"```text\n{inspect.getdoc(documented)}\n```"


def errors_page() -> str:
    """The tree of errors, and of each class what it means."""
    tree = (inspect.getdoc(errors) or "").partition("\n\n")[2]
    parts = [
        _ERRORS,
        f"```text\n{tree.rpartition(chr(10) * 2)[0]}\n```\n",
        f"{tree.rpartition(chr(10) * 2)[2]}\n",
        "| class | |\n|---|---|",
    ]
    for name in errors.__all__:
        found = getattr(errors, name)
        if inspect.isclass(found):
            parts.append(f"| `{name}` | {(inspect.getdoc(found) or '').splitlines()[0]} |")
    return "\n".join(parts) + "\n"


def manifest() -> str:
    """Every field of training_manifest.json."""
    schema = importlib.resources.files("mens_core.artifacts") / "manifest_schema.json"
    fields = json.loads(schema.read_text(encoding="utf-8"))["properties"]
    parts = [
        _MANIFEST,
        "| field | type | |\n|---|---|---|",
        *(f"| `{name}` | {_type(field)} | {_cell(field['description'])} |" for name, field in fields.items()),
    ]
    return "\n".join(parts) + "\n"


def decisions() -> str:
    """The decisions by number."""
    pages = sorted((DOCS / "decisions").glob("0*.md"))
    titles = (page.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ") for page in pages)
    entries = [f"- [{title}]({page.name})" for page, title in zip(pages, titles, strict=True)]
    return "\n".join([_DECISIONS, *entries]) + "\n"


def _type(field: Mapping[str, Any]) -> str:
    kinds = field["type"] if isinstance(field["type"], list) else [field["type"]]
    return " or ".join(kinds)


PAGES = {
    "decisions/index.md": decisions,
    "reference/command_line.md": command_line,
    "reference/configuration.md": configuration,
    "reference/errors.md": errors_page,
    "reference/hooks.md": hooks,
    "reference/manifest.md": manifest,
}


if __name__ == "__main__":
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")
