"""The merged model's folder, which transformers and whoever reads its format opens as it is."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from mens_core.artifacts.files import write_json, write_text
from mens_core.artifacts.tensors import Block, stream_tensors
from mens_core.hf.files import find_file
from mens_core.hf.header import WIDTHS

__all__ = ["Blocks", "Specs", "copy_companions", "write_card", "write_weights"]

#: Name → (dtype code, shape).
Specs = Mapping[str, tuple[str, tuple[int, ...]]]
#: The tensor of a name, piece by piece.
Blocks = Callable[[str], Iterable[Block]]

_METADATA = {"format": "pt"}
# What belongs to a model beside its weights; code is not copied.
_COMPANIONS = ("*.json", "*.jinja", "*.txt", "*.model", "LICENSE*", "NOTICE*", "USE_POLICY*")
_NOT_COPIED = ("config.json", "model.safetensors.index.json", "README.md")
_DTYPE_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def write_weights(folder: Path, specs: Specs, blocks: Blocks, *, max_shard_bytes: int) -> list[str]:
    """Write ``model.safetensors``, or shards with their index, as transformers names them.

    Args:
        folder: exists.
        specs: all tensors, in the order of the base.
        blocks: called once for each.
        max_shard_bytes: no shard is larger, unless by a single tensor.

    Returns:
        Names of the files.
    """
    shards: list[dict[str, tuple[str, tuple[int, ...]]]] = [{}]
    filled = 0
    for name, (code, shape) in specs.items():
        size = math.prod(shape) * WIDTHS[code]
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = code, shape
        filled += size
    if len(shards) == 1:
        stream_tensors(folder / "model.safetensors", specs, blocks, _METADATA)
        return ["model.safetensors"]
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for file, shard in zip(names, shards, strict=True):
        stream_tensors(folder / file, shard, blocks, _METADATA)
    total = sum(math.prod(shape) * WIDTHS[code] for code, shape in specs.values())
    weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    return names


def copy_companions(base: Path, folder: Path, config: Mapping[str, Any], *, dtype: str | None, untied: bool) -> None:
    """Copy configuration, tokenizer, template and licence; say in the configuration what is different.

    Args:
        base: folder of the base.
        folder: of the merged model.
        config: the base's config.json.
        dtype: code of the format of all weights; None if each kept its own.
        untied: whether the head has become a tensor of its own.
    """
    for pattern in _COMPANIONS:
        for path in sorted(base.glob(pattern)):
            source = find_file(base, path.name)
            if source is not None and source.is_file() and path.name not in _NOT_COPIED:
                shutil.copyfile(source, folder / path.name)
    changed = dict(config)
    if untied:
        changed["tie_word_embeddings"] = False
        if isinstance(changed.get("text_config"), dict):
            changed["text_config"] = {**changed["text_config"], "tie_word_embeddings": False}
    if dtype is not None:
        # Older versions of transformers know it as torch_dtype.
        changed.pop("torch_dtype", None)
        changed["dtype"] = _DTYPE_NAMES[dtype]
    write_json(folder / "config.json", changed)


def write_card(folder: Path, report: Mapping[str, Any], license_class: str | None) -> None:
    """README.md: where the model comes from, and how exactly it is what it says."""
    adapters = "\n".join(f"| Adapter | {entry['source']} × {entry['weight']:g} |" for entry in report["adapters"])
    licence = f"license: {license_class}\n" if license_class else ""
    totals = report["totals"]
    text = f"""---
base_model: {report["base_model"]}
base_model_relation: finetune
library_name: transformers
pipeline_tag: text-generation
{licence}tags: [merged, lora]
---

# {report["base_model"]} with {"its adapter" if len(report["adapters"]) == 1 else "adapters"} merged in

| | |
|---|---|
| Base | {report["base_model"]} ({report["onto"]}) |
{adapters}
| Tensors | {totals["merged"]} merged, {totals["copied"]} as they were |
| Update | {totals["relative_update"]:.2e} of the merged weights' norm |
| Rounding | {totals["relative_rounding"]:.2e} of the update's norm |

The licence of the base holds for this model too. `merge_report.json` has the numbers of every tensor.
"""
    write_text(folder / "README.md", text)
