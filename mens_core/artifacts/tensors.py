"""Safetensors without a tensor library: read by memory map, written whole or not at all. Nothing is ever unpickled.

``read_header`` says what a file holds; ``open_tensors`` opens a model folder, sharded or not, as one mapping;
``write_tensors`` and ``stream_tensors`` write files that safetensors, transformers and PEFT open.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mens_core.artifacts.header import CODES, DTYPES, TensorInfo, make_header, read_header
from mens_core.atomic import replacing
from mens_core.errors import ModelError

__all__ = [
    "TensorFolder",
    "TensorInfo",
    "open_tensors",
    "read_header",
    "read_tensors",
    "stream_tensors",
    "write_tensors",
]

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_REFUSED = ("*.bin", "*.pt", "*.pth", "*.ckpt")

AnyArray: TypeAlias = NDArray[Any]


class TensorFolder(Mapping[str, AnyArray]):
    """The tensors of a model folder by name; each access gives a read-only view into the mapped file.

    A name that is not there raises ModelError instead of KeyError, because it is the folder that is wrong.
    """

    def __init__(self, folder: Path, places: Mapping[str, tuple[Path, TensorInfo]]) -> None:
        self._folder, self._places = folder, dict(places)
        self._maps: dict[Path, mmap.mmap] = {}

    @property
    def headers(self) -> dict[str, TensorInfo]:
        """Name → what its header says, without touching the tensors."""
        return {name: info for name, (_, info) in self._places.items()}

    def __getitem__(self, name: str) -> AnyArray:
        if name not in self._places:
            raise ModelError(f"the model has no tensor {name}", where=self._folder)
        path, info = self._places[name]
        if path not in self._maps:
            self._maps[path] = _map_file(path)
        return _view(self._maps[path], info)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def read_tensors(path: Path) -> dict[str, AnyArray]:
    """Name → read-only view of every tensor in one safetensors file.

    Raises:
        ModelError: as ``read_header`` does.
    """
    infos = read_header(path)
    mapped = _map_file(path)
    return {name: _view(mapped, info) for name, info in infos.items()}


def open_tensors(folder: Path) -> TensorFolder:
    """Open the weights of a model folder: ``model.safetensors``, or the shards that its index names.

    Only headers are read here.

    Raises:
        ModelError: if there are no weights or only pickled ones; if the index is malformed, leaves the folder,
            or names a file or tensor that is not there; if a header is malformed (see ``read_header``).
    """
    if (folder / _SINGLE).exists():
        path = folder / _SINGLE
        return TensorFolder(folder, {name: (path, info) for name, info in read_header(path).items()})
    if (folder / _INDEX).exists():
        return TensorFolder(folder, _open_shards(folder))
    pickles = sorted(path.name for pattern in _REFUSED for path in folder.glob(pattern))
    if pickles:
        raise ModelError(
            f"the weights are pickled ({', '.join(pickles[:3])}) and pickles are refused: loading one runs its code",
            where=folder,
            expected=f"{_SINGLE}, or shards with {_INDEX}",
            fix="convert them on a machine you trust: transformers' save_pretrained writes safetensors",
        )
    raise ModelError("the model folder holds no weights", where=folder, expected=f"{_SINGLE}, or shards with {_INDEX}")


def write_tensors(path: Path, tensors: Mapping[str, AnyArray], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file; after a crash the old file is there or the new one, never a part.

    Args:
        path: the file; its folder must exist.
        tensors: name → array of any type that the format knows.
        metadata: texts for the header, such as ``{"format": "pt"}``.

    Raises:
        ModelError: if the format has no code for an array's type.
        OSError: as the file system reports it; an old file is then untouched.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in CODES:
            raise ModelError(f"a tensor of type {tensor.dtype} cannot be stored", where=f"{path}, tensor {name}")
    specs = {name: (CODES[tensor.dtype], tensor.shape) for name, tensor in tensors.items()}
    stream_tensors(path, specs, tensors.__getitem__, metadata)


def stream_tensors(
    path: Path,
    specs: Mapping[str, tuple[str, tuple[int, ...]]],
    read: Callable[[str], AnyArray],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file from tensors that are made one at a time, so that never two of them are held.

    Args:
        path: the file; its folder must exist.
        specs: name → (dtype code, shape), known beforehand.
        read: called once per name, in the order of the file.
        metadata: texts for the header.

    Raises:
        ModelError: if an array is not what its spec says.
        OSError: as the file system reports it; an old file is then untouched.
    """
    # Wide types first, as the reference implementation does: every tensor then starts at a multiple of its width.
    order = sorted(specs, key=lambda name: (-DTYPES[specs[name][0]].itemsize, name))
    header = make_header({name: specs[name] for name in order}, metadata)
    with replacing(path, binary=True) as (file,):
        file.write(header)
        for name in order:
            tensor = np.asarray(read(name), order="C")
            if (CODES.get(tensor.dtype), tensor.shape) != (specs[name][0], tuple(specs[name][1])):
                found, announced = f"{tensor.dtype} {tensor.shape}", specs[name]
                raise ModelError(f"tensor {name} is {found}, not {announced} as announced", where=path)
            file.write(tensor.reshape(-1).view(np.uint8).data)


def _open_shards(folder: Path) -> dict[str, tuple[Path, TensorInfo]]:
    index = folder / _INDEX
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(weight_map.values()))
        paths = {file: folder / file for file in files}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"the shard index cannot be read: {error}", where=index, expected='{"weight_map": {tensor: file}}'
        ) from error
    for file, path in paths.items():
        if file.startswith("/") or ".." in path.parts or "\\" in file:
            raise ModelError(f"the shard index leaves its folder: {file}", where=index, expected="plain file names")
        if not path.is_file():
            raise ModelError(
                f"a shard is missing: {file}", where=folder, fix="download the model again, or copy the shard"
            )
    places: dict[str, tuple[Path, TensorInfo]] = {}
    for path in paths.values():
        for name, info in read_header(path).items():
            if name in places:
                raise ModelError(f"two shards hold tensor {name}", where=f"{places[name][0].name} and {path.name}")
            places[name] = (path, info)
    absent = [name for name, file in weight_map.items() if name not in places or places[name][0] != paths[file]]
    if absent:
        raise ModelError(f"the index names tensors that their shard does not hold: {_listing(absent)}", where=index)
    return places


def _map_file(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _view(mapped: mmap.mmap, info: TensorInfo) -> AnyArray:
    count = math.prod(info.shape)
    return np.frombuffer(mapped, info.numpy_dtype, count, info.start if count else 0).reshape(info.shape)


def _listing(names: list[str]) -> str:
    return ", ".join(sorted(names)[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
