"""YAML without its traps: read to plain values, a key twice is an error, 2e-4 is a number, aliases are refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from mens_core.errors import MensError

__all__ = ["read_mapping"]


def read_mapping(path: Path, error: type[MensError]) -> dict[str, Any]:
    """Read a file that holds one mapping of words to values.

    Args:
        path: UTF-8 file.
        error: what to raise; the kind of error its user would look for.

    Raises:
        MensError: of the given kind, if the file cannot be read, is no mapping, or gives a key twice.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506 (a subclass of SafeLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError, ValueError) as problem:
        raise error(f"the YAML file cannot be read: {problem}", where=path) from problem
    if not isinstance(content, dict):
        raise error("the YAML file is no mapping", where=path, expected="lines such as rank: 8")
    return content


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            # An alias to an alias to an alias makes a small file large.
            raise yaml.constructor.ConstructorError(
                None,
                None,
                "aliases are not read; write the value out",
                self.peek_event().start_mark,  # type: ignore[no-untyped-call]
            )
        return super().compose_node(parent, index)


def _unique(loader: _Loader, node: yaml.MappingNode) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is no word", key_node.start_mark)
        if key in mapping:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", key_node.start_mark)
        mapping[key] = loader.construct_object(value_node, deep=True)
    return mapping


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique)
# YAML 1.1 reads 2e-4, without a point, as text; everybody means the number.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+"), list("-+0123456789.")
)
