"""What a folder's headers say, at any size, and that a folder which lies is refused before a weight is read."""

import json
import math
import os
import subprocess
import sys

import pytest
from folders import INDEX, LLAMA_70B, write_file, write_index, write_shards
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mens_core.artifacts.tensors import open_tensors
from mens_core.errors import ModelError
from mens_core.hf.header import WIDTHS, read_header
from mens_core.hf.inventory import middle_coverage, read_inventory
from mens_core.hf.keymap import linear_shapes, tensor_shapes
from mens_core.hf.layout import read_layout

SINGLE = "model.safetensors"
CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 50,
}


def write_raw(path, header, data=b""):
    """A file that starts as a safetensors file would, with any JSON or bytes as its header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def layout_of(folder, config):
    """The layout of a config written to a folder."""
    (folder / "config.json").write_text(json.dumps(config))
    return read_layout(folder)


def model(folder, config=CONFIG, dtype="F32"):
    """The layout of a config, and its tensors' specs."""
    layout = layout_of(folder, config)
    return layout, {name: (dtype, shape) for name, shape in tensor_shapes(layout).items()}


# --- what it says -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 3])
def test_an_inventory_tells_files_tensors_places_and_sizes(count, tmp_path):
    layout, specs = model(tmp_path)
    specs |= {"packed": ("U8", (7,)), "half": ("BF16", (3, 5, 2))}
    if count:
        write_shards(tmp_path, specs, count)
    else:
        write_file(tmp_path / SINGLE, specs)
    found = read_inventory(tmp_path, layout)
    assert [path.name for path in found.files] == sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert {name: (info.dtype, info.shape) for name, info in found.tensors.items()} == specs
    assert set(found.places) == set(specs)
    assert all(found.places[name] in found.files for name in specs)
    numbers = sum(math.prod(shape) for code, shape in specs.values() if code == "F32") + 30
    assert found.parameters == numbers
    assert found.stored_bytes == 4 * (numbers - 30) + 60 + 7
    assert found.linears == linear_shapes(layout)
    assert dict(open_tensors(tmp_path).headers) == dict(found.tensors)


def test_linears_of_an_unknown_family_are_matrices_that_are_no_table(tmp_path):
    layout = layout_of(tmp_path, CONFIG | {"model_type": "mamba7"})
    specs = {
        "model.tok.weight": ("F32", (50, 32)),
        "transformer.wpe.weight": ("F32", (64, 32)),
        "block.0.in.weight": ("F32", (48, 32)),
        "block.0.in.bias": ("F32", (48,)),
        "block.0.conv.weight": ("F32", (48, 1, 4)),
        "block.0.out.weight": ("F32", (32, 48)),
    }
    write_file(tmp_path / SINGLE, specs)
    assert sorted(read_inventory(tmp_path, layout).linears.values()) == [(32, 48), (48, 32)]
    assert sorted(read_inventory(tmp_path, None).linears.values()) == [(32, 48), (48, 32), (50, 32)]


def test_a_model_of_seventy_billion_is_told_in_well_under_a_second_and_a_tenth_of_a_gigabyte(tmp_path):
    layout, specs = model(tmp_path, LLAMA_70B, "BF16")
    specs = dict(specs)
    held = 2 * sum(math.prod(shape) for _, shape in specs.values())
    specs["padding"] = ("U8", (400_000_000_000 - held,))
    write_shards(tmp_path, specs, 100)
    assert sum(path.stat().st_blocks for path in tmp_path.iterdir()) * 512 < 10_000_000
    script = (
        "import json, resource, sys, time; from pathlib import Path\n"
        "from mens_core.hf.layout import read_layout; from mens_core.hf.inventory import read_inventory\n"
        "start = time.perf_counter(); folder = Path(sys.argv[1]); found = read_inventory(folder, read_layout(folder))\n"
        "seconds = time.perf_counter() - start\n"
        "print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, len(found.files),\n"
        "    len(found.tensors), found.stored_bytes, found.parameters, 'numpy' in sys.modules]))"
    )
    # The kernel counts the peak of the process that forks as the child's; a shell in between is small.
    command = ["/bin/sh", "-c", '"$@"; exit $?', "sh", sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds, kilobytes, files, tensors, stored, parameters, numpy = json.loads(done.stdout)
    assert (files, tensors, stored) == (100, len(specs), 400_000_000_000)
    assert parameters == held // 2
    assert seconds < 0.5
    assert kilobytes < 100_000
    assert not numpy
    assert middle_coverage(layout, specs, "qlora").keys_matched == 80


def test_unrelated_files_are_not_looked_at(tmp_path, monkeypatch):
    write_file(tmp_path / SINGLE, {"a": ("F32", (2,))})

    def forbidden(*_):
        raise AssertionError("the folder was listed")

    monkeypatch.setattr(os, "scandir", forbidden)
    monkeypatch.setattr(os, "listdir", forbidden)
    assert len(read_inventory(tmp_path, None).tensors) == 1


# --- links ------------------------------------------------------------------------------------------------------


def test_links_within_the_folder_and_into_the_hub_caches_blobs_are_followed(tmp_path):
    repository = tmp_path / "models--owner--name"
    snapshot, blobs = repository / "snapshots" / "abc", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    write_file(blobs / "f00", {"a": ("F32", (2,))})
    (snapshot / "one.safetensors").symlink_to("../../blobs/f00")
    write_file(snapshot / "real", {"b": ("F32", (2,))})
    (snapshot / "two.safetensors").symlink_to("real")
    (blobs / "beef").write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    (snapshot / INDEX).symlink_to("../../blobs/beef")
    (tmp_path / "shortcut").symlink_to(snapshot)
    for folder in (snapshot, tmp_path / "shortcut"):
        assert sorted(read_inventory(folder, None).tensors) == ["a", "b"]


@pytest.mark.parametrize("name", [SINGLE, INDEX, "one.safetensors"])
@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("../outside", "leads out of the model folder"),
        ("../blobs/outside", "leads out of the model folder"),
        ("../nothing", "No such file"),
        ("loop", "in a circle|symbolic links"),
    ],
)
def test_a_link_that_leaves_the_folder_or_leads_nowhere_is_refused(name, target, message, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "blobs").mkdir()
    for outside in (tmp_path / "outside", tmp_path / "blobs" / "outside"):
        write_file(outside, {"a": ("F32", (2,))})
    (folder / "loop").symlink_to("loop")
    if name == "one.safetensors":
        write_index(folder, {"a": name})
    (folder / name).symlink_to(target)
    with pytest.raises(ModelError, match=message) as caught:
        read_inventory(folder, None)
    assert name in str(caught.value)


# --- files that are none ----------------------------------------------------------------------------------------


def test_a_folder_or_a_pipe_in_place_of_a_file_is_refused_at_once(tmp_path):
    for name in (SINGLE, INDEX):
        (tmp_path / name).mkdir()
        with pytest.raises(ModelError, match=f"(?s)not a regular file.*{name}"):
            read_inventory(tmp_path, None)
        (tmp_path / name).rmdir()
        os.mkfifo(tmp_path / name)
        with pytest.raises(ModelError, match=f"(?s)not a regular file.*{name}"):
            read_inventory(tmp_path, None)
        (tmp_path / name).unlink()


def test_a_device_in_place_of_a_file_is_refused_at_once():
    from pathlib import Path

    with pytest.raises(ModelError, match="not a regular file"):
        read_header(Path("/dev/zero"))


def test_a_file_that_may_not_be_read_is_refused(tmp_path, monkeypatch):
    write_file(tmp_path / SINGLE, {"a": ("F32", (2,))})

    def forbidden(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", forbidden)
    with pytest.raises(ModelError, match=f"(?s)Permission denied.*{SINGLE}"):
        read_inventory(tmp_path, None)


def test_a_folder_that_is_none_is_refused(tmp_path):
    with pytest.raises(ModelError, match="No such file"):
        read_inventory(tmp_path / "nowhere", None)
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="Not a directory"):
        read_inventory(tmp_path / "file", None)


def test_pickles_are_named_and_refused_but_not_beside_safetensors(tmp_path):
    (tmp_path / "pytorch_model.BIN").write_bytes(b"\x80\x02")
    with pytest.raises(ModelError, match=r"pytorch_model\.BIN.*pickles are refused"):
        read_inventory(tmp_path, None)
    write_file(tmp_path / SINGLE, {"a": ("F32", (2,))})
    assert read_inventory(tmp_path, None).parameters == 2


# --- indices that lie -------------------------------------------------------------------------------------------

BAD_NAMES = {
    "absolute": "/one.safetensors",
    "parent": "../one.safetensors",
    "hidden parent": "sub/../../one.safetensors",
    "backslash": "..\\one.safetensors",
    "number": 3,
    "null": None,
    "list": ["one.safetensors"],
    "empty": "",
    "the index itself": INDEX,
    "pickle": "pytorch_model.bin",
    "zero byte": "one\0.safetensors",
}


@pytest.mark.parametrize("case", BAD_NAMES)
def test_an_index_may_only_name_safetensors_of_its_own_folder(case, tmp_path):
    write_file(tmp_path / "one.safetensors", {"a": ("F32", (2,))})
    write_index(tmp_path, {"a": "one.safetensors", "b": BAD_NAMES[case]})
    with pytest.raises(ModelError, match="no file of its folder") as caught:
        read_inventory(tmp_path, None)
    assert str(tmp_path / INDEX) in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "cannot be read"),
        (b"[]", "no weight_map"),
        (b'{"weight_map": {}}', "no weight_map"),
        (b'{"weight_map": ["a"]}', "no weight_map"),
        (b'{"weight_map": {"a": "one.safetensors", "a": "two.safetensors"}}', "a key occurs twice"),
        (b'{"weight_map": ' + b"[" * 10**5, "nests too deep"),
        (b'{"weight_map": {"\xff": "one.safetensors"}}', "utf-8"),
        (b'{"weight_map": {"b": "one.safetensors"}}', "does not hold: b"),
        (b'{"weight_map": {"a": "\\ud800.safetensors"}}', "shards are missing"),
        (b'{"weight_map": {"a": "' + b"x" * 5000 + b'.safetensors"}}', "shards are missing"),
        (b'{"weight_map": {"a": "two.safetensors"}}', r"1 of 1 shards are missing: two\.safetensors"),
    ],
)
def test_an_index_that_lies_is_refused_by_name(raw, message, tmp_path):
    write_file(tmp_path / "one.safetensors", {"a": ("F32", (2,))})
    (tmp_path / INDEX).write_bytes(raw)
    with pytest.raises(ModelError, match=message) as caught:
        read_inventory(tmp_path, None)
    assert str(tmp_path) in str(caught.value)


def test_a_tensor_in_two_shards_is_refused_with_both(tmp_path):
    for file in ("one.safetensors", "two.safetensors"):
        write_file(tmp_path / file, {"a": ("F32", (2,)), file: ("F32", (1,))})
    write_index(tmp_path, {"a": "one.safetensors", "two.safetensors": "two.safetensors"})
    with pytest.raises(ModelError, match=r"(?s)tensor a.*one\.safetensors and two\.safetensors"):
        read_inventory(tmp_path, None)


@pytest.mark.parametrize("name", ["\x1b[2J.safetensors", "a\n  to mend it: run this.safetensors", "\udcff.safetensors"])
def test_a_name_that_would_steer_the_terminal_is_shown_escaped(name, tmp_path):
    write_index(tmp_path, {name: name})
    with pytest.raises(ModelError, match="shards are missing") as caught:
        read_inventory(tmp_path, None)
    folder = tmp_path / name.removesuffix(".safetensors")
    folder.mkdir()
    with pytest.raises(ModelError, match="no weights") as located:
        read_inventory(folder, None)
    write_raw(tmp_path / SINGLE, {name: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, bytes(9))
    with pytest.raises(ModelError, match="leave a gap") as malformed:
        read_inventory(tmp_path, None)
    for error in (caught, located, malformed):
        text = str(error.value)
        assert all(line.isprintable() for line in text.split("\n"))
        assert "\n  to mend it: run this" not in text


# --- headers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": {"dtype": "F32", "shape": [2**62, 2**62, 0], "data_offsets": [0, 0]}}, "overflows"),
        ({"a": {"dtype": "F32", "shape": [2**64, 0], "data_offsets": [0, 0]}}, "whole numbers"),
        ({"a": {"dtype": "F32", "shape": [1] * 33, "data_offsets": [0, 4]}}, "at most 32"),
        ({"a": {"dtype": "F32", "shape": [10**4000] * 500, "data_offsets": [0, 4]}}, "shape"),
        ({"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}, "shape"),
        ({"a": {"dtype": "F64", "shape": [1], "data_offsets": [0, 4]}}, "does not fill"),
        ({"a": [[[]]] * 700_000}, "too many parts"),
        ('{"a": 1}'.encode("utf-16"), "JSON"),
    ],
)
def test_a_header_made_to_exhaust_its_reader_is_refused(header, message, tmp_path):
    with pytest.raises(ModelError, match=message) as caught:
        read_header(write_raw(tmp_path / SINGLE, header, bytes(4)))
    assert len(str(caught.value)) < 1000


def test_a_file_of_very_many_small_tensors_is_read(tmp_path):
    specs = {f"t{n}": ("U8", (1,)) for n in range(50_000)}
    assert len(read_header(write_file(tmp_path / SINGLE, specs))) == 50_000


def check_tiles(path):
    """A header is refused, or its tensors lie end to end from the header to the file's end."""
    try:
        infos = read_header(path)
    except ModelError as error:
        assert SINGLE in str(error)  # noqa: PT017
        return
    ranges = sorted((info.start, info.stop) for info in infos.values())
    end = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    for start, stop in ranges:
        assert start == end
        end = stop
    assert end == path.stat().st_size
    assert all(info.elements * WIDTHS[info.dtype] == info.stop - info.start for info in infos.values())


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=st.binary(max_size=80), length=st.none() | st.integers(0, 90))
def test_any_bytes_are_no_header_or_one_whose_ranges_tile_the_file(tmp_path, raw, length):
    (tmp_path / SINGLE).write_bytes(raw if length is None else length.to_bytes(8, "little") + raw)
    check_tiles(tmp_path / SINGLE)


SPECS = {"a": ("F32", (2, 3)), "b": ("BF16", (4,)), "c": ("I64", ()), "empty": ("F16", (0, 5))}


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_to_a_header_is_refused_or_leaves_ranges_that_tile_the_file(tmp_path, data):
    path = write_file(tmp_path / SINGLE, SPECS)
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(raw) - 1))
        kind = data.draw(st.sampled_from(["change", "insert", "cut"]))
        byte = data.draw(st.integers(0, 255) | st.sampled_from(b'0123456789-[]{},:"'))
        if kind == "change":
            raw[place] = byte
        elif kind == "insert":
            raw.insert(place, byte)
        else:
            del raw[place : place + data.draw(st.integers(1, 9))]
            raw = raw or bytearray(1)
    path.write_bytes(raw)
    check_tiles(path)


VALUES = st.none() | st.booleans() | st.floats() | st.integers(-2, 40) | st.integers() | st.text(max_size=3)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*WIDTHS, "F31"]) | VALUES,
        "shape": st.lists(st.integers(0, 4) | VALUES, max_size=3) | VALUES,
        "data_offsets": st.lists(st.integers(0, 40) | VALUES, max_size=3) | VALUES,
    }
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=st.dictionaries(st.text(max_size=3), ENTRY | VALUES, max_size=3), size=st.integers(0, 40))
def test_any_entries_are_refused_or_tile_the_file(tmp_path, header, size):
    check_tiles(write_raw(tmp_path / SINGLE, header, bytes(size)))
