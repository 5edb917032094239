"""What a model folder's safetensors headers say: names, shapes, sizes and places. The weights are never read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from mens_core.errors import ModelError, printable
from mens_core.hf.blocks import inventory_names, ordered_middle_projection_keys
from mens_core.hf.files import find_file, read_json
from mens_core.hf.header import FLOATS, TensorInfo, read_header
from mens_core.hf.keymap import linear_shapes
from mens_core.hf.layout import Layout

__all__ = [
    "Coverage",
    "Inventory",
    "decoder_linears",
    "holds_weights",
    "middle_coverage",
    "read_inventory",
    "read_shards",
]

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# What tables of tokens and positions are called in the families that transformers knows.
_TABLES = ("embed", "wte", "wpe", "position", "lm_head")


@attrs.frozen(kw_only=True)
class Inventory:
    """The tensors of a model folder.

    Invariants: ``tensors`` and ``places`` have the same names; each place is one of ``files``.

    Attributes:
        folder: the model folder.
        files: the weight files, in order.
        tensors: name as stored → what its file's header says.
        places: name as stored → the file that holds it.
        linears: module path → (out, in) of every linear layer of the decoder, see ``read_inventory``.
    """

    folder: Path
    files: tuple[Path, ...]
    tensors: Mapping[str, TensorInfo] = attrs.field(repr=False)
    places: Mapping[str, Path] = attrs.field(repr=False)
    linears: Mapping[str, tuple[int, int]] = attrs.field(repr=False)

    @property
    def parameters(self) -> int:
        """The number of elements of all tensors in a floating-point format."""
        return sum(info.elements for info in self.tensors.values() if info.dtype in FLOATS)

    @property
    def stored_bytes(self) -> int:
        """The size of all tensors on disk, in bytes, headers not counted."""
        return sum(info.stop - info.start for info in self.tensors.values())

    @property
    def digest(self) -> str:
        """Sha256, as hexadecimal text, over names, types and shapes of all tensors."""
        headers = sorted((name, info.dtype, info.shape) for name, info in self.tensors.items())
        return hashlib.sha256(json.dumps(headers).encode()).hexdigest()


@attrs.frozen
class Coverage:
    """How many of the attention output projections, one a layer, a model folder holds.

    Attributes:
        eligible: whether they were counted at all.
        complete: whether all are there; None where none was counted or expected.
        keys_matched: how many are there.
        keys_expected: how many config.json asks for.
    """

    eligible: bool
    complete: bool | None
    keys_matched: int | None
    keys_expected: int | None


def read_inventory(folder: Path, layout: Layout | None) -> Inventory:
    """Read the headers of ``model.safetensors``, or of the shards that its index names.

    The linear layers are those of the layout's family. Where the layout has none, or is None, they are the
    matrices that are no table of tokens or positions.

    Raises:
        ModelError: if there are no weights or only pickled ones; if the index is malformed, leaves the folder,
            or names a file or tensor that is not there; if two shards hold one tensor; if a header is malformed
            (see ``read_header``) or a file may not be opened (see ``find_file``).
    """
    single = find_file(folder, _SINGLE)
    index = _read_index(folder) if single is None else {}
    files = tuple(sorted(set(index.values()))) if single is None else (single,)
    tensors, places = _read_headers(files)
    absent = [name for name, path in index.items() if places.get(name) != path]
    if absent:
        raise ModelError(
            f"the index names tensors that their shard does not hold: {_listing(absent)}", where=folder / _INDEX
        )
    return Inventory(
        folder=folder, files=files, tensors=tensors, places=places, linears=decoder_linears(layout, tensors)
    )


def read_shards(files: Sequence[Path], layout: Layout | None) -> Inventory:
    """Read the headers of given safetensors files, which may be a part of a model.

    Raises:
        ModelError: if a file may not be opened, its header is malformed, or two hold one tensor.
    """
    tensors, places = _read_headers(files)
    return Inventory(
        folder=files[0].parent,
        files=tuple(files),
        tensors=tensors,
        places=places,
        linears=decoder_linears(layout, tensors),
    )


def holds_weights(folder: Path) -> bool:
    """Whether a folder has a weight file or an index of them."""
    return any(find_file(folder, name) is not None for name in (_SINGLE, _INDEX))


def decoder_linears(layout: Layout | None, tensors: Mapping[str, TensorInfo]) -> dict[str, tuple[int, int]]:
    """Module path → (out, in) of every linear layer, by the family or, where there is none, by rule."""
    if layout is not None and layout.family is not None:
        return linear_shapes(layout)
    return _linears_by_rule(tensors, None if layout is None else layout.vocab_size)


def middle_coverage(layout: Layout, names: Iterable[str], method: str) -> Coverage:
    """Count the attention output projections that are there.

    Args:
        layout: what config.json asks for.
        names: the tensors' names as stored.
        method: of the adapter; only ``qlora`` is counted, as in the runbook's planner.

    Returns:
        Not eligible, with nothing counted, for another method or a family the core does not know.
    """
    if method != "qlora" or layout.family is None:
        return Coverage(eligible=False, complete=None, keys_matched=None, keys_expected=None)
    expected = ordered_middle_projection_keys(layout)
    matched = len(inventory_names(layout, names).intersection(expected))
    complete = matched == len(expected) if expected else None
    return Coverage(eligible=True, complete=complete, keys_matched=matched, keys_expected=len(expected))


def _read_headers(files: Iterable[Path]) -> tuple[dict[str, TensorInfo], dict[str, Path]]:
    tensors: dict[str, TensorInfo] = {}
    places: dict[str, Path] = {}
    for path in files:
        infos = read_header(path)
        twice = [name for name in infos if name in places]
        if twice:
            where = f"{places[twice[0]].name} and {path.name}"
            raise ModelError(f"two shards hold tensor {_listing(twice)}", where=where)
        tensors |= infos
        places |= dict.fromkeys(infos, path)
    return tensors, places


def _read_index(folder: Path) -> dict[str, Path]:
    """Tensor name → the shard that should hold it."""
    path = find_file(folder, _INDEX)
    if path is None:
        raise _no_weights(folder)
    expected = '{"weight_map": {tensor: file}}, the files plain names of safetensors in the same folder'
    index = read_json(path, expected=expected)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError("the shard index has no weight_map", where=path, expected=expected)
    bad = [file for file in weight_map.values() if not _is_shard_name(file)]
    if bad:
        raise ModelError(
            f"the shard index names what is no file of its folder: {bad[0]!r:.200}", where=path, expected=expected
        )
    shards = {file: find_file(folder, file) for file in sorted(set(weight_map.values()))}
    missing = [file for file, shard in shards.items() if shard is None]
    if missing:
        raise ModelError(
            f"{len(missing)} of {len(shards)} shards are missing: {_listing(missing)}",
            where=folder,
            fix="download the model again, or copy the shards",
        )
    return {name: folder / file for name, file in weight_map.items()}


def _is_shard_name(file: Any) -> bool:
    return isinstance(file, str) and file.endswith(".safetensors") and not set(file) & set("/\\\0")


def _no_weights(folder: Path) -> ModelError:
    expected = f"{_SINGLE}, or shards with {_INDEX}"
    try:
        with os.scandir(folder) as entries:
            pickles = sorted(entry.name for entry in entries if entry.name.lower().endswith(_PICKLES))
    except OSError as error:
        return ModelError(f"the model folder cannot be read: {error.strerror}", where=folder, expected=expected)
    if not pickles:
        return ModelError("the model folder holds no weights", where=folder, expected=expected)
    return ModelError(
        f"the weights are pickled ({_listing(pickles)}) and pickles are refused: loading one runs its code",
        where=folder,
        expected=expected,
        fix="convert them on a machine you trust: transformers' save_pretrained writes safetensors",
    )


def _linears_by_rule(tensors: Mapping[str, TensorInfo], vocab_size: int | None) -> dict[str, tuple[int, int]]:
    return {
        name.removesuffix(".weight"): (info.shape[0], info.shape[1])
        for name, info in tensors.items()
        if len(info.shape) == 2 and info.shape[0] != vocab_size and not any(word in name for word in _TABLES)
    }


def _listing(names: list[str]) -> str:
    shown = ", ".join(map(printable, sorted(names)[:5]))
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")
