"""YAML without its traps: read to plain values, a key twice is an error, 2e-4 is a number, aliases are refused."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from mens_core.errors import MensError

__all__ = ["read_mapping", "unknown_keys"]

_LONGEST = 1_000_000


def read_mapping(path: Path, error: type[MensError]) -> dict[str, Any]:
    """Read a file that holds one mapping of words to values.

    Args:
        path: UTF-8 file.
        error: what to raise; the kind of error its user would look for.

    Raises:
        MensError: of the given kind, if the file cannot be read, is no mapping, or gives a key twice.
    """
    # heavy: help is generated from the contract and reads no file
    import yaml  # noqa: PLC0415

    try:
        # A pipe or a device could keep its reader waiting.
        if not path.is_file() or path.stat().st_size > _LONGEST:
            raise error("the YAML file cannot be read", where=path, expected=f"a file of at most {_LONGEST:,} bytes")
        content = yaml.load(path.read_text(encoding="utf-8"), _loader())  # noqa: S506 (a subclass of SafeLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError, ValueError) as problem:
        raise error(f"the YAML file cannot be read: {problem}", where=path) from problem
    if not isinstance(content, dict):
        raise error("the YAML file is no mapping", where=path, expected="lines such as rank: 8")
    return content


def unknown_keys(content: Mapping[str, Any], keys: Collection[str], where: str) -> list[str]:
    """A line for every key that is none of ``keys``, with the nearest of them.

    Args:
        content: as it was read.
        keys: that there are.
        where: what stands before a key in the line, such as ``steps.``.
    """
    lines = []
    for key in content:
        if key not in keys:
            close = difflib.get_close_matches(key, keys, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            lines.append(f"{where}{key} is not a key{hint} (keys: {', '.join(keys)})")
    return lines


@functools.cache
def _loader() -> Any:
    """YAML's safe loader with the stricter rules."""
    # heavy: see above
    import yaml  # noqa: PLC0415

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                # An alias to an alias to an alias makes a small file large.
                mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
                raise yaml.constructor.ConstructorError(None, None, "aliases are not read; write the value out", mark)
            return super().compose_node(parent, index)

    def unique(loader: Loader, node: yaml.MappingNode) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = loader.construct_object(key_node, deep=True)
            problem = f"the key {key!r} is no word" if not isinstance(key, str) else f"the key {key!r} stands twice"
            if not isinstance(key, str) or key in mapping:
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            mapping[key] = loader.construct_object(value_node, deep=True)
        return mapping

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, unique)
    # YAML 1.1 reads 2e-4, without a point, as text; everybody means the number.
    number = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789."))
    return Loader
