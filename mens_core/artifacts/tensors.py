"""Safetensors without a tensor library: read by memory map, written whole or not at all. Nothing is ever unpickled.

``read_header`` says what a file holds; ``open_tensors`` opens a model folder, sharded or not, as one mapping;
``write_tensors`` and ``stream_tensors`` write files that safetensors, transformers and PEFT open.
"""

from __future__ import annotations

import math
import mmap
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple, Self, TypeAlias

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from mens_core.artifacts.files import copy_bytes
from mens_core.atomic import replacing
from mens_core.errors import ModelError
from mens_core.hf.header import WIDTHS, TensorInfo, make_header, read_header
from mens_core.hf.inventory import Inventory, read_inventory
from mens_core.machine import processors

__all__ = [
    "AnyArray",
    "Block",
    "StoredBytes",
    "TensorFolder",
    "TensorInfo",
    "open_tensors",
    "read_header",
    "read_tensors",
    "stream_tensors",
    "write_tensors",
]

_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}

# Blocks that may wait for the disk while the next one is made.
_AHEAD = 2
# Bytes after which the disk is told to begin with them, so that the end of a large file need not wait for all of it.
_BEGUN_AT_ONCE = 1 << 24

#: An array of any type that the format knows.
AnyArray: TypeAlias = NDArray[Any]


class StoredBytes(NamedTuple):
    """Bytes [start, stop) of a file."""

    path: Path
    start: int
    stop: int


#: A part of a tensor, as ``stream_tensors`` takes it.
Block: TypeAlias = AnyArray | StoredBytes | Callable[[], AnyArray]


class TensorFolder(Mapping[str, AnyArray]):
    """The tensors of a model folder by name; each access gives a read-only view into the mapped file.

    A name that is not there raises ModelError instead of KeyError, because it is the folder that is wrong.
    """

    def __init__(self, inventory: Inventory) -> None:
        self._inventory = inventory
        self._maps: dict[Path, mmap.mmap] = {}

    def stored(self, name: str) -> StoredBytes:
        """Where a tensor's bytes are."""
        info = self.headers[name]
        return StoredBytes(self._inventory.places[name], info.start, info.stop)

    def read_into(self, name: str, out: AnyArray) -> None:
        """Read a tensor into memory that is there, without mapping it.

        Pages of a file that are mapped and copied into fresh memory cost five times as much as those that are read.

        Args:
            name: of the tensor.
            out: contiguous, of the tensor's own type and shape.

        Raises:
            ModelError: if the file has become shorter than its header says.
        """
        path, start, stop = self.stored(name)
        room = out.reshape(-1).view(np.uint8).data
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            while room:
                count = file.readinto(room)
                if not count:
                    raise ModelError(f"tensor {name} ends before its {stop - start} bytes", where=path)
                room = room[count:]

    def forget(self) -> None:
        """Tell the system that the pages read so far need not stay in memory; what is read again is mapped again."""
        if hasattr(mmap, "MADV_DONTNEED"):
            for mapped in self._maps.values():
                mapped.madvise(mmap.MADV_DONTNEED)

    @property
    def headers(self) -> Mapping[str, TensorInfo]:
        """Name → what its header says, without touching the tensors."""
        return self._inventory.tensors

    def __getitem__(self, name: str) -> AnyArray:
        if name not in self.headers:
            raise ModelError(f"the model has no tensor {name}", where=self._inventory.folder)
        path = self._inventory.places[name]
        if path not in self._maps:
            self._maps[path] = _map_file(path)
        return _view(self._maps[path], self.headers[name])

    def __contains__(self, name: object) -> bool:
        return name in self.headers

    def __iter__(self) -> Iterator[str]:
        return iter(self.headers)

    def __len__(self) -> int:
        return len(self.headers)


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
        ModelError: as ``read_inventory`` does.
    """
    return TensorFolder(read_inventory(folder, None))


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
        if tensor.dtype not in _CODES:
            raise ModelError(f"a tensor of type {tensor.dtype} cannot be stored", where=f"{path}, tensor {name}")
    specs = {name: (_CODES[tensor.dtype], tensor.shape) for name, tensor in tensors.items()}
    stream_tensors(path, specs, lambda name: (tensors[name],), metadata)


def stream_tensors(
    path: Path,
    specs: Mapping[str, tuple[str, tuple[int, ...]]],
    blocks: Callable[[str], Iterable[Block]],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file from tensors that are made piece by piece, so that none has to be held.

    Args:
        path: the file; its folder must exist.
        specs: name → (dtype code, shape), known beforehand.
        blocks: called once per name, in the order of the file: the tensor's rows, or bytes of another file, or what
            makes rows, which is called in the thread that writes, one after the other.
        metadata: texts for the header.

    Raises:
        ModelError: if the blocks are not what their spec says.
        OSError: as the file system reports it; an old file is then untouched.
    """
    # Wide types first, as the reference implementation does: every tensor then starts at a multiple of its width.
    order = sorted(specs, key=lambda name: (-WIDTHS[specs[name][0]], name))
    header = make_header({name: specs[name] for name in order}, metadata)
    with replacing(path, binary=True) as (file,), _Writer(file) as writer:
        file.write(header)
        for name in order:
            code, shape = specs[name]
            where, size = f"{path}, tensor {name}", math.prod(shape) * WIDTHS[code]
            for block in blocks(name):
                writer.write(block, code, where)
            writer.end(size, where)


class _Writer:
    """Writes blocks in their order while the next ones are made, and has the disk begin with them along the way.

    At most ``_AHEAD`` blocks wait, so that a slow disk does not fill the memory; on one processor none does, since a
    block is best rounded and written while it is in the cache. An error is raised by the next ``write`` or by the end
    of the ``with``.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mens-write")
        self._waiting: deque[Future[None]] = deque()
        self._size = self._begun = 0
        self._alone = processors() == 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(cancel_futures=error is not None)
        if error is None:
            for done in self._waiting:
                done.result()

    def write(self, block: Block, code: str, where: str) -> None:
        """Take one block, which must not change any more."""
        self._later(self._put, block, code, where)

    def end(self, size: int, where: str) -> None:
        """Check the bytes of the tensor whose blocks were taken."""
        self._later(self._check, size, where)

    def _later(self, task: Callable[..., None], *arguments: Any) -> None:
        if self._alone:
            task(*arguments)
            return
        while len(self._waiting) >= _AHEAD:
            self._waiting.popleft().result()
        self._waiting.append(self._thread.submit(task, *arguments))

    def _put(self, block: Block, code: str, where: str) -> None:
        if callable(block):
            block = block()
        if isinstance(block, StoredBytes):
            copy_bytes(block.path, block.start, block.stop, self._file)
            size = block.stop - block.start
        elif _CODES.get(block.dtype) != code:
            raise ModelError(f"a block of type {block.dtype} where {code} was announced", where=where)
        else:
            size = self._file.write(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)
        self._size += size
        self._begin()

    def _begin(self) -> None:
        size = self._file.tell() - self._begun
        if size < _BEGUN_AT_ONCE or not hasattr(os, "posix_fadvise"):
            return
        self._file.flush()
        # On Linux this starts the writing of dirty pages and waits for none; it drops only those that are on the disk.
        os.posix_fadvise(self._file.fileno(), self._begun, size, os.POSIX_FADV_DONTNEED)
        self._begun += size

    def _check(self, size: int, where: str) -> None:
        if self._size != size:
            raise ModelError(f"{self._size} bytes where {size} were announced", where=where)
        self._size = 0


def _map_file(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _view(mapped: mmap.mmap, info: TensorInfo) -> AnyArray:
    count, dtype = info.elements, _DTYPES[info.dtype]
    return np.frombuffer(mapped, dtype, count, info.start if count else 0).reshape(info.shape)
