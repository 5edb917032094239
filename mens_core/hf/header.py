"""The header of a safetensors file: checked before anything it says is believed.

    8 bytes   length N of the header, little-endian
    N bytes   JSON: name → {"dtype", "shape", "data_offsets": [begin, end]}, and "__metadata__"
    the rest  the tensors' bytes, little-endian, row-major, without gaps

Source: the format's description at github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import attrs

from mens_core.errors import ModelError, printable
from mens_core.hf.files import LONGEST_JSON, parse_json, regular_size

__all__ = ["FLOATS", "WIDTHS", "TensorInfo", "make_header", "read_header"]

WIDTHS = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
}
"""Code of a number format → bytes an element."""
FLOATS = frozenset(code for code in WIDTHS if code.startswith(("F", "BF")))

# NumPy 1's most axes and longest array in bytes; a shape beyond them could not be opened, only make sums slow.
_MOST_AXES = 32
_MOST_BYTES = 2**63 - 1


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
    def elements(self) -> int:
        """How many numbers the tensor has."""
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read and check the header of one safetensors file; the tensors are not touched.

    Raises:
        ModelError: if the file is missing, truncated or malformed: header too long or no JSON object, unknown
            dtype, negative length, offsets outside the file, gaps, overlaps, or bytes that do not fit the shape.
    """
    size = regular_size(path)
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, LONGEST_JSON):
                raise _malformed(path, f"it announces a header of {length} bytes, the file has {size}")
            entries = parse_json(file.read(length))
    except OSError as error:
        raise ModelError(f"the safetensors file cannot be read: {error.strerror}", where=path) from error
    except ValueError as error:
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
        end = begin + math.prod(shape) * WIDTHS[code]
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
    if not isinstance(code, str) or code not in WIDTHS:
        raise _malformed(where, f"its dtype {_short(code)} is not known")
    if not _are_counts(shape) or len(shape) > _MOST_AXES:
        raise _malformed(where, f"its shape {_short(shape)} is no list of at most {_MOST_AXES} whole numbers from 0")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise _malformed(where, f"its offsets {_short(offsets)} are no pair of whole numbers from 0")
    if math.prod(length or 1 for length in shape) * WIDTHS[code] > _MOST_BYTES:
        raise _malformed(where, f"its shape {_short(shape)} overflows, so it does not fill any file")
    if offsets[1] - offsets[0] != math.prod(shape) * WIDTHS[code]:
        problem = f"shape {_short(shape)} of {code} does not fill the bytes {offsets[0]} to {offsets[1]}"
        raise _malformed(where, problem)
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
            raise _malformed(path, f"{printable(name)} and {printable(following)} {fault}: byte {stop} against {start}")


def _are_counts(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value <= _MOST_BYTES for value in values)


def _short(value: object) -> str:
    return reprlib.repr(value)


def _malformed(where: object, problem: str) -> ModelError:
    return ModelError(
        f"the safetensors file is malformed: {problem}",
        where=where,
        fix="download or save the file again; it may have been cut short",
    )
