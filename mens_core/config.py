"""A contract's fields in a YAML file, and how a file, a preset and explicit fields come together.

    preset: safe            # optional; what follows wins over it
    model: ./Qwen2.5-0.5B   # fields flat …
    data_dir: corpus
    adapter:                # … or under their section
      rank: 8

Later ones win: the file's own preset, the file, the preset that is asked for beside it, explicit fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mens_core.contract import SECTIONS, FineTuneContract, Layer
from mens_core.errors import ContractError
from mens_core.presets import preset_fields
from mens_core.strict_yaml import read_mapping

__all__ = ["build_contract", "read_config"]


def build_contract(
    given: Layer, *, config: str | Path | None = None, preset: str | None = None, trains: bool = True
) -> FineTuneContract:
    """Bring file, preset and explicit fields together.

    Args:
        given: where the explicit fields come from, for people, and the fields.
        config: a YAML file.
        preset: name of a preset; wins over the file.
        trains: whether data and output folder are required.

    Raises:
        ContractError: listing every problem; or the file cannot be read, or there is no such preset.
    """
    layers: list[Layer] = []
    if config is not None:
        layers += read_config(Path(config))
    if preset is not None:
        layers.append((f"preset {preset}", preset_fields(preset)))
    return FineTuneContract.from_layers([*layers, given], trains=trains)


def read_config(path: Path) -> list[Layer]:
    """Read a file of fields: the layer of the preset it names, if it names one, and its own.

    Raises:
        ContractError: if it cannot be read, is no mapping, or gives a field twice.
    """
    content = read_mapping(path, ContractError)
    layers = [(f"preset {name}", preset_fields(str(name)))] if (name := content.pop("preset", None)) else []
    return [*layers, (f"file {path}", _flat(content, path))]


def _flat(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for key, value in content.items():
        inner = value if key in SECTIONS and isinstance(value, dict) else {key: value}
        for name, field in inner.items():
            if name in fields:
                raise ContractError(f"{name} is given twice", where=path)
            fields[name] = field
    return fields
