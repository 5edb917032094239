"""The header of a safetensors file: checked before anything it says is believed.

    8 bytes   length N of the header, little-endian
    N bytes   JSON: name → {"dtype", "shape", "data_offsets": [begin, end]}, and "__metadata__"
    the rest  the tensors' bytes, little-endian, row-major, without gaps

Source: the format's description at github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import attrs
import ml_dtypes
import numpy as np

from mens_core.errors import ModelError

__all__ = ["CODES", "DTYPES", "TensorInfo", "make_header", "read_header"]

DTYPES: dict[str, np.dtype[Any]] = {
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
CODES = {dtype: code for code, dtype in DTYPES.items()}

# The reference implementation's limit; a 7-billion-parameter model's header has some 30 thousand bytes.
_LONGEST_HEADER = 100_000_000


@attrs.frozen(kw_only=True)
class TensorInfo:
    """What a header says of one tensor.

    Invariants: the dtype is known; start ≤ stop ≤ size of the file; stop - start = elements x bytes an element.

    Attributes:
        dtype: the format's own code, such as ``F32`` or ``BF16``.
        shape: lengths of the axes; empty for a single number.
        start: first byte in the file.
        stop: byte after the last one.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """The NumPy type that holds such numbers."""
        return DTYPES[self.dtype]


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read and check the header of one safetensors file; the tensors are not touched.

    Raises:
        ModelError: if the file is missing, truncated or malformed: header too long or no JSON object, unknown
            dtype, negative length, offsets outside the file, gaps, overlaps, or bytes that do not fit the shape.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _LONGEST_HEADER):
                raise _malformed(path, f"it announces a header of {length} bytes, the file has {size}")
            entries = json.loads(file.read(length), object_pairs_hook=_without_repeats)
    except OSError as error:
        raise ModelError(f"the safetensors file cannot be read: {error.strerror}", where=path) from error
    except (ValueError, RecursionError) as error:
        raise _malformed(path, f"its header is not valid JSON: {error}") from error
    if not isinstance(entries, dict):
        raise _malformed(path, "its header is not a JSON object")
    entries.pop("__metadata__", None)
    infos = {name: _read_info(path, name, entry, 8 + length) for name, entry in entries.items()}
    _check_cover(path, infos, 8 + length, size)
    return infos


def make_header(specs: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """Length and JSON for tensors that follow end to end in the order of ``specs``, name → (dtype code, shape)."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    begin = 0
    for name, (code, shape) in specs.items():
        end = begin + math.prod(shape) * DTYPES[code].itemsize
        entries[name] = {"dtype": code, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _read_info(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    where = f"{path}, tensor {name}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _malformed(where, "its entry does not hold dtype, shape and data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise _malformed(where, f"its dtype {code!r} is not known")
    if not _are_counts(shape):
        raise _malformed(where, f"its shape {shape!r} is no list of whole numbers from 0")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise _malformed(where, f"its offsets {offsets!r} are no pair of whole numbers from 0")
    if offsets[1] - offsets[0] != math.prod(shape) * DTYPES[code].itemsize:
        raise _malformed(where, f"shape {shape} of {code} does not fill the bytes {offsets[0]} to {offsets[1]}")
    start, stop = (data_start + offset for offset in offsets)
    return TensorInfo(dtype=code, shape=tuple(shape), start=start, stop=stop)


def _check_cover(path: Path, infos: Mapping[str, TensorInfo], data_start: int, size: int) -> None:
    """The tensors must lie end to end from the header to the end of the file."""
    edges = [(data_start, data_start, "the header")]
    edges += sorted((info.start, info.stop, name) for name, info in infos.items())
    edges.append((size, size, "the end of the file"))
    for (_, stop, name), (start, _, following) in pairwise(edges):
        if start != stop:
            fault = "overlap" if start < stop else "leave a gap"
            raise _malformed(path, f"{name} and {following} {fault}: byte {stop} against {start}")


def _are_counts(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a key occurs twice")
    return entries


def _malformed(where: object, problem: str) -> ModelError:
    return ModelError(
        f"the safetensors file is malformed: {problem}",
        where=where,
        fix="download or save the file again; it may have been cut short",
    )
