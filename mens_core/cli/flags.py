"""The contract's fields as flags: one flag per field, its help, unit, default and evidence from the field itself."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

import attrs

from mens_core.config import build_contract
from mens_core.contract import FineTuneContract, contract_fields
from mens_core.presets import PRESETS

__all__ = ["add_contract_flags", "add_layer_flags", "contract_from", "given_fields"]


def add_contract_flags(parser: argparse.ArgumentParser, sections: tuple[str, ...] | None = None) -> None:
    """Add a flag for every field of the given sections (all of them if not given), grouped by section."""
    groups: dict[str, Any] = {}
    for section, field in contract_fields():
        if sections is None or section in sections:
            group = groups.setdefault(section, parser.add_argument_group(section) if section not in groups else None)
            _add_flag(group, field)


def contract_from(arguments: argparse.Namespace) -> FineTuneContract:
    """Build the contract: flags over ``--preset`` over ``--config`` over defaults.

    Raises:
        ContractError: listing every problem.
    """
    return build_contract(("flag", given_fields(arguments)), config=arguments.config, preset=arguments.preset)


def add_layer_flags(parser: argparse.ArgumentParser) -> None:
    """Add ``--config`` and ``--preset``."""
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML file of the fields below, such as rank: 8; it may name a preset, and flags win over it",
    )
    parser.add_argument(
        "--preset",
        metavar="NAME",
        help=f"named settings; they win over --config, and flags win over them: {', '.join(PRESETS)}",
    )


def given_fields(arguments: argparse.Namespace) -> dict[str, Any]:
    """The contract's fields for which a flag was given."""
    names = {field.name for _, field in contract_fields()}
    return {name: value for name, value in vars(arguments).items() if name in names and value is not None}


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
        type=functools.partial(_parsed, field.metadata["parse"]),
        metavar=_metavar(field),
        default=None,
        help=_help(field),
    )


def _parsed(parse: Callable[[str], Any], text: str) -> Any:
    """The value of a flag's text, or the text: the contract then names it beside every other problem."""
    try:
        return parse(text)
    except ValueError:
        return text


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
    elif field.default not in {None, ()} and not isinstance(field.default, bool):
        notes.append(f"default {_shown(field.default)}")
    text = str(field.metadata["help"]) + (f" ({'; '.join(notes)})" if notes else "")
    evidence = field.metadata.get("evidence")
    # argparse expands %; the texts hold it literally.
    return (text + (f" [{evidence}]" if evidence else "")).replace("%", "%%")


def _shown(default: object) -> str:
    if isinstance(default, tuple):
        return ",".join(default)
    return f"{default:g}" if isinstance(default, float) else str(default)
