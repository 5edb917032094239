"""The contract's fields as flags: one flag per field, its help, unit, default and evidence from the field itself."""

from __future__ import annotations

import argparse
from typing import Any

import attrs

from mens_core.contract import FineTuneContract, contract_fields
from mens_core.presets import PRESETS, preset_fields

__all__ = ["add_contract_flags", "contract_from"]


def add_contract_flags(parser: argparse.ArgumentParser, sections: tuple[str, ...] | None = None) -> None:
    """Add a flag for every field of the given sections (all of them if not given), grouped by section."""
    groups: dict[str, Any] = {}
    for section, field in contract_fields():
        if sections is None or section in sections:
            group = groups.setdefault(section, parser.add_argument_group(section) if section not in groups else None)
            _add_flag(group, field)


def contract_from(arguments: argparse.Namespace, *, trains: bool = True) -> FineTuneContract:
    """Build the contract: flags over preset over defaults.

    Raises:
        ContractError: listing every problem.
    """
    names = {field.name for _, field in contract_fields()}
    given = {name: value for name, value in vars(arguments).items() if name in names and value is not None}
    preset = preset_fields(arguments.preset) if getattr(arguments, "preset", None) else {}
    return FineTuneContract.from_fields(trains=trains, **{**preset, **given})


def add_preset_flag(parser: argparse.ArgumentParser) -> None:
    """Add ``--preset``."""
    parser.add_argument(
        "--preset", metavar="NAME", help=f"named settings that explicit flags override: {', '.join(PRESETS)}"
    )


def _add_flag(group: Any, field: attrs.Attribute[Any]) -> None:
    flag = field.metadata.get("flag", f"--{field.name.replace('_', '-')}")
    if isinstance(field.default, bool):
        # A field that is on by default has a flag that names its negation, and the other way round.
        group.add_argument(
            flag, dest=field.name, action="store_const", const=not field.default, default=None, help=_help(field)
        )
        return
    group.add_argument(
        flag,
        dest=field.name,
        type=field.metadata["parse"],
        metavar=_metavar(field),
        default=None,
        help=_help(field),
    )


def _metavar(field: attrs.Attribute[Any]) -> str:
    if "choices" in field.metadata:
        return str("|".join(field.metadata["choices"]))
    metavar: str | None = field.metadata.get("metavar")
    default = "DIR" if field.metadata.get("required") else "TEXT"
    return metavar or {int: "N", float: "X"}.get(field.metadata["parse"], default)


def _help(field: attrs.Attribute[Any]) -> str:
    notes = [str(field.metadata["unit"])] if "unit" in field.metadata else []
    if field.metadata.get("required"):
        notes.append("required")
    elif field.default is not None and not isinstance(field.default, bool):
        notes.append(f"default {_shown(field.default)}")
    text = str(field.metadata["help"]) + (f" ({'; '.join(notes)})" if notes else "")
    evidence = field.metadata.get("evidence")
    # argparse expands %; the texts hold it literally.
    return (text + (f" [{evidence}]" if evidence else "")).replace("%", "%%")


def _shown(default: object) -> str:
    if isinstance(default, tuple):
        return ",".join(default)
    return f"{default:g}" if isinstance(default, float) else str(default)
