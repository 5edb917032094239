"""The safetensors reader and writer, against hand-made files and the reference library."""

from __future__ import annotations

import errno
import json
import os
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mens_core.artifacts import tensors
from mens_core.artifacts.tensors import open_tensors, read_header, read_tensors, stream_tensors, write_tensors
from mens_core.errors import ModelError

if TYPE_CHECKING:
    from pathlib import Path

DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.int32, np.uint8, np.bool_]


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, Any]:
    listed = [list(value) if isinstance(value, tuple) else value for value in (shape, offsets)]
    return {"dtype": dtype, "shape": listed[0], "data_offsets": listed[1]}


def file_of(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def tensors_of_every_type() -> dict[str, np.ndarray[Any, Any]]:
    numbers = np.arange(6).reshape(2, 3)
    tensors = {np.dtype(dtype).name: numbers.astype(dtype) for dtype in DTYPES}
    return tensors | {"single": np.array(2.5, np.float32), "empty": np.zeros((0, 4), np.float32)}


def test_a_written_file_reads_back_bit_for_bit(tmp_path: Path) -> None:
    tensors = tensors_of_every_type()
    write_tensors(tmp_path / "model.safetensors", tensors, {"format": "pt"})
    back = open_tensors(tmp_path)
    assert set(back) == set(tensors)
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert back[name].shape == tensor.shape
        assert back[name].tobytes() == tensor.tobytes()
        assert back.headers[name].shape == tensor.shape
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_the_reference_library_reads_what_we_write_and_the_other_way_round(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    tensors = tensors_of_every_type()
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    write_tensors(ours, tensors, {"format": "pt", "name": "grüße"})
    safetensors.save_file(tensors, theirs, {"format": "pt"})
    for name, tensor in safetensors.load_file(ours).items():
        assert tensors[name].tobytes() == tensor.tobytes()
    for name, tensor in read_tensors(theirs).items():
        assert tensors[name].tobytes() == tensor.tobytes()


@settings(max_examples=25, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3).map(tuple), max_size=4),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shapes_survive_the_round_trip(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[tuple[int, ...]], dtype: type
) -> None:
    path = tmp_path_factory.mktemp("trip") / "t.safetensors"
    random = np.random.default_rng(0)
    tensors = {f"tensor.{n}": random.integers(0, 2, shape).astype(dtype) for n, shape in enumerate(shapes)}
    write_tensors(path, tensors, {})
    back = read_tensors(path)
    assert {name: tensor.tobytes() for name, tensor in tensors.items()} == {n: t.tobytes() for n, t in back.items()}


def test_views_are_read_only(tmp_path: Path) -> None:
    write_tensors(tmp_path / "model.safetensors", {"a": np.ones(3, np.float32)}, {})
    with pytest.raises(ValueError, match="read-only"):
        open_tensors(tmp_path)["a"][0] = 2.0


MALFORMED = {
    "unknown dtype": ({"a": entry(dtype="F31")}, bytes(8), "F31"),
    "dtype of another kind": ({"a": entry(dtype=["F32"])}, bytes(8), "dtype"),
    "negative length": ({"a": entry(shape=(-2,))}, bytes(8), "shape"),
    "truth value as length": ({"a": entry(shape=(2, True))}, bytes(8), "shape"),
    "negative offset": ({"a": entry(offsets=(-8, 0))}, bytes(8), "offsets"),
    "backward offsets": ({"a": entry(offsets=(8, 0))}, bytes(8), "does not fill"),
    "three offsets": ({"a": entry(offsets=(0, 4, 8))}, bytes(8), "pair"),
    "bytes that do not fit the shape": ({"a": entry(shape=(3,))}, bytes(8), "does not fill"),
    "overflowing shape": ({"a": entry(shape=(2**40, 2**40))}, bytes(8), "does not fill"),
    "offsets past the end": ({"a": entry(offsets=(0, 8))}, bytes(4), "overlap"),
    "overlap": ({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12), "overlap"),
    "gap": ({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20), "gap"),
    "bytes that belong to nobody": ({"a": entry()}, bytes(9), "gap"),
    "missing key": ({"a": {"dtype": "F32", "shape": [2]}}, bytes(8), "data_offsets"),
    "entry of another kind": ({"a": 7}, b"", "entry"),
    "array instead of object": ([1, 2], b"", "object"),
    "no JSON": (b"{nonsense", b"", "JSON"),
    "no UTF-8": (b'{"\xff":1}', b"", "JSON"),
    "a name twice": (b'{"a":1,"a":2}', b"", "twice"),
    "nested without end": (b"[" * 200_000, b"", "JSON"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_header_is_refused_by_name(tmp_path: Path, case: str) -> None:
    header, data, word = MALFORMED[case]
    path = file_of(tmp_path / "model.safetensors", header, data)
    with pytest.raises(ModelError, match=word) as caught:
        read_header(path)
    assert "model.safetensors" in str(caught.value)


@pytest.mark.parametrize("size", [0, 7, 8, 20])
def test_a_truncated_file_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "model.safetensors"
    write_tensors(path, {"a": np.ones((4, 4), np.float32)}, {})
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ModelError, match="malformed"):
        read_header(path)


@pytest.mark.parametrize("length", [2**63, 100_000_001, 3])
def test_an_absurd_header_length_is_refused_before_anything_is_read(tmp_path: Path, length: int) -> None:
    with pytest.raises(ModelError, match="malformed"):
        read_header(file_of(tmp_path / "model.safetensors", {"a": entry()}, bytes(8), length))


def sharded(folder: Path, weight_map: object = None) -> Path:
    write_tensors(folder / "one.safetensors", {"a": np.ones(2, np.float32)}, {})
    write_tensors(folder / "two.safetensors", {"b": np.zeros(3, np.float32)}, {})
    weight_map = weight_map if weight_map is not None else {"a": "one.safetensors", "b": "two.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_shards_open_as_one_mapping(tmp_path: Path) -> None:
    folder = open_tensors(sharded(tmp_path))
    assert sorted(folder) == ["a", "b"]
    assert "b" in folder
    assert "c" not in folder
    assert folder["b"].shape == (3,)
    with pytest.raises(ModelError, match="no tensor c"):
        folder["c"]


@pytest.mark.parametrize(
    ("weight_map", "word"),
    [
        ({"a": "../one.safetensors"}, "no file of its folder"),
        ({"a": "/etc/passwd"}, "no file of its folder"),
        ({"a": "sub/../../one.safetensors"}, "no file of its folder"),
        ({"a": "three.safetensors"}, "missing"),
        ({"a": "two.safetensors", "b": "one.safetensors"}, "does not hold"),
        ({"a": "one.safetensors", "z": "one.safetensors"}, "does not hold: z"),
        ({"a": 3}, "no file of its folder"),
        (["a"], "no weight_map"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path: Path, weight_map: object, word: str) -> None:
    with pytest.raises(ModelError, match=word):
        open_tensors(sharded(tmp_path, weight_map))


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    write_tensors(folder / "two.safetensors", {"a": np.zeros(2, np.float32), "b": np.zeros(3, np.float32)}, {})
    with pytest.raises(ModelError, match="two shards"):
        open_tensors(folder)


def test_pickled_weights_are_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(ModelError, match="save_pretrained"):
        open_tensors(tmp_path)


def test_a_folder_without_weights_says_what_it_expects(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        open_tensors(tmp_path)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_tensors(path, {"a": np.ones(2, np.float32)}, {})
    before = path.read_bytes()
    with pytest.raises(ModelError, match="where 12 were announced"):
        stream_tensors(path, {"a": ("F32", (3,))}, lambda _: [np.ones(2, np.float32)], {})
    with pytest.raises(ModelError, match="complex64"):
        write_tensors(path, {"a": np.ones(2, np.complex64)}, {})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["model.safetensors"]  # noqa: PTH208


@pytest.mark.parametrize("processors", [1, 2])
def test_rows_are_made_when_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processors: int) -> None:
    monkeypatch.setattr(tensors, "processors", lambda: processors)
    path, specs = tmp_path / "model.safetensors", {"a": ("F32", (8,))}
    made: list[int] = []

    def make(number: int) -> np.ndarray[Any, Any]:
        made.append(number)
        return np.full(1, number, np.float32)

    stream_tensors(path, specs, lambda _: [partial(make, number) for number in range(8)], {})
    assert read_tensors(path)["a"].tolist() == made == list(range(8))
    before = path.read_bytes()
    with pytest.raises(ZeroDivisionError):
        stream_tensors(path, specs, lambda _: [lambda: np.ones(1 // 0, np.float32)], {})
    with pytest.raises(ModelError, match="float64 where F32 was announced"):
        stream_tensors(path, specs, lambda _: [lambda: np.ones(8)], {})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["model.safetensors"]  # noqa: PTH208


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system takes no advice")
def test_the_disk_begins_with_every_part_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[tuple[int, ...]] = []

    def advised(handle: int, start: int, size: int, _advice: int) -> None:
        assert os.fstat(handle).st_size >= start + size
        begun.append((start, start + size))

    monkeypatch.setattr(tensors, "_BEGUN_AT_ONCE", 4)
    monkeypatch.setattr(os, "posix_fadvise", advised)
    write_tensors(tmp_path / "m.safetensors", {name: np.ones(2, np.float32) for name in "abc"}, {})
    size = (tmp_path / "m.safetensors").stat().st_size
    assert begun == list(pairwise([0, size - 16, size - 8, size]))


def test_a_disk_that_confirms_with_an_error_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_handle: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as context:
        context.setattr(os, "fsync", refuse)
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            write_tensors(tmp_path / "m.safetensors", {"a": np.ones(2, np.float32)}, {})
    assert os.listdir(tmp_path) == []  # noqa: PTH208
    write_tensors(tmp_path / "m.safetensors", {"a": np.ones(2, np.float32)}, {})
    assert read_tensors(tmp_path / "m.safetensors")["a"].tolist() == [1.0, 1.0]


def test_tensors_are_asked_for_one_at_a_time(tmp_path: Path) -> None:
    asked: list[str] = []

    def blocks(name: str) -> list[np.ndarray[Any, Any]]:
        asked.append(name)
        return [np.full(1, len(asked), np.float32)] * 2

    stream_tensors(tmp_path / "m.safetensors", {"b": ("F32", (2,)), "a": ("F32", (2,))}, blocks, {})
    assert asked == ["a", "b"]
    assert read_tensors(tmp_path / "m.safetensors")["b"].tolist() == [2.0, 2.0]
