"""The chat templates of a model folder, with the tokens they may name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
from tokenizers import Tokenizer

from mens_core.errors import ModelError
from mens_core.hf.files import find_file, read_json, regular_size

__all__ = ["TemplateFiles", "read_templates"]

_LONGEST_BYTES = 4_000_000


@attrs.frozen
class TemplateFiles:
    """What a model folder says about how its conversations are written.

    Attributes:
        default: the Jinja source for a conversation without functions.
        tool_use: that for one with functions; the same unless the folder names another one.
        tokens: text of each token that the tokenizer's configuration names, such as ``eos_token``.
        ends: texts of the tokens at which the model stops by itself.
    """

    default: str
    tool_use: str
    tokens: Mapping[str, str]
    ends: frozenset[str]


def read_templates(folder: Path, tokenizer: Tokenizer) -> TemplateFiles | None:
    """Look for chat templates where transformers 5 looks for them.

    Args:
        folder: of the model.
        tokenizer: of the model, by which its configuration's ids are read.

    Returns:
        None if there is no template.

    Raises:
        ModelError: if a file cannot be read or is malformed.
    """
    config = _object(folder, "tokenizer_config.json")
    named = _named(config, folder / "tokenizer_config.json") | _files(folder)
    if not named:
        named = _named(_object(folder, "chat_template.json"), folder / "chat_template.json")
    if not named:
        return None
    if "default" not in named:
        raise ModelError(
            "the chat template for an ordinary conversation is missing",
            where=f"{folder}: the templates are called {', '.join(sorted(named))}",
            expected="one that is called default",
        )
    tokens = _tokens(config)
    if "added_tokens_decoder" not in config:
        tokens |= _tokens(_object(folder, "special_tokens_map.json"))
    stops = _object(folder, "generation_config.json").get("eos_token_id")
    ids = [stop for stop in (stops if isinstance(stops, list) else [stops]) if type(stop) is int and stop >= 0]
    ends = frozenset(filter(None, [tokens.get("eos_token"), *map(tokenizer.id_to_token, ids)]))
    return TemplateFiles(named["default"], named.get("tool_use", named["default"]), tokens, ends)


def _named(config: Mapping[str, Any], path: Path) -> dict[str, str]:
    """The templates in a JSON file, by name; a single one is the default."""
    given = config.get("chat_template")
    if given is None:
        return {}
    if isinstance(given, str):
        return {"default": given}
    entries = given if isinstance(given, list) else [given]
    named = {
        entry["name"]: entry["template"]
        for entry in entries
        if isinstance(entry, dict) and isinstance(entry.get("name"), str) and isinstance(entry.get("template"), str)
    }
    if len(named) != len(entries):
        raise ModelError(
            "the chat template is malformed",
            where=f"{path}: chat_template",
            expected='a text, or a list of {"name": …, "template": …} with different names',
        )
    return named


def _files(folder: Path) -> dict[str, str]:
    """The templates that have a file each."""
    default = find_file(folder, "chat_template.jinja")
    named = {} if default is None else {"default": _text(default)}
    others = folder / "additional_chat_templates"
    if others.is_dir():
        names = sorted(path.name for path in others.glob("*.jinja"))
        found = {name: find_file(folder, f"{others.name}/{name}") for name in names}
        named |= {name.removesuffix(".jinja"): _text(path) for name, path in found.items() if path is not None}
    return named


def _text(path: Path) -> str:
    if regular_size(path) > _LONGEST_BYTES:
        raise ModelError("the chat template is too long", where=path, expected=f"at most {_LONGEST_BYTES} bytes")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"the chat template cannot be read: {error}", where=path) from error


def _object(folder: Path, name: str) -> dict[str, Any]:
    """A JSON file of the folder; empty if there is none."""
    path = find_file(folder, name)
    if path is None:
        return {}
    value = read_json(path, expected="a JSON object")
    if not isinstance(value, dict):
        raise ModelError(f"{name} is not an object", where=path, expected="a JSON object")
    return value


def _tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The tokens that a configuration names, whether as texts or as objects with a ``content``."""
    texts = {
        key: value.get("content") if isinstance(value, dict) else value
        for key, value in config.items()
        if key.endswith("_token")
    }
    return {key: text for key, text in texts.items() if isinstance(text, str)}
