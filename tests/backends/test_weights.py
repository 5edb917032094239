"""A model folder is read completely or refused by name; never is a gap filled with random numbers."""

import shutil

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from mens_core.errors import ModelError
from mens_core.exchange import GenerateSettings

SINGLE = "model.safetensors"


@pytest.fixture
def damaged(folders, family, tmp_path):
    """Copy a model folder with its tensors changed by a function."""

    def damage(change):
        folder = shutil.copytree(folders[family], tmp_path / family)
        tensors = load_file(folder / SINGLE)
        change(tensors)
        save_file(tensors, folder / SINGLE, {"format": "pt"})
        return folder

    return damage


def _inner(tensors):
    """The name of a linear weight inside the first block."""
    return next(name for name in sorted(tensors) if ".0." in name and tensors[name].ndim == 2)


def _refusal(backend, folder, **fields):
    with pytest.raises(ModelError) as caught:
        backend.open(tiny.plan_for(backend, folder, **fields), tiny.SHAPE)
    return str(caught.value)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_missing_tensor_is_named(backend, damaged, method):
    gone = []
    folder = damaged(lambda tensors: gone.append(_inner(tensors)) or tensors.pop(gone[0]))
    assert f"{gone[0]} is missing" in _refusal(backend, folder, method=method)


def test_a_left_over_tensor_is_named(backend, damaged):
    folder = damaged(lambda tensors: tensors.update(stray=np.ones(3, np.float32)))
    assert "stray is left over" in _refusal(backend, folder)


def test_a_misshapen_tensor_is_named(backend, damaged):
    names = []

    def cut(tensors):
        names.append(_inner(tensors))
        tensors[names[0]] = np.ascontiguousarray(tensors[names[0]][:-1])

    assert f"{names[0] if names else ''}" in (text := _refusal(backend, damaged(cut)))
    assert f"{names[0]} has shape" in text


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_tensor_that_is_not_finite_is_named(backend, damaged, bad, method):
    names = []

    def spoil(tensors):
        names.append(_inner(tensors))
        tensors[names[0]] = tensors[names[0]].copy()
        tensors[names[0]][1, 2] = bad

    folder = damaged(spoil)
    assert f"{names[0]} is not finite" in _refusal(backend, folder, method=method)


def test_all_problems_are_listed_together(backend, damaged):
    names = []

    def spoil(tensors):
        names.append(_inner(tensors))
        tensors.pop(names[0])
        tensors["stray"] = np.ones(3, np.float32)

    text = _refusal(backend, damaged(spoil))
    assert f"{names[0]} is missing" in text
    assert "stray is left over" in text


def test_a_folder_without_safetensors_is_refused(backend, folders, family, tmp_path):
    folder = shutil.copytree(folders[family], tmp_path / family)
    (folder / SINGLE).rename(folder / "pytorch_model.bin")
    assert str(folder) in _refusal(backend, folder)


def test_a_damaged_file_is_refused(backend, folders, family, tmp_path):
    folder = shutil.copytree(folders[family], tmp_path / family)
    (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:200])
    assert str(folder) in _refusal(backend, folder)


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_files_in_bfloat16_are_read_exactly(backend, folders, family, tmp_path, method, dtype):
    import ml_dtypes

    short = shutil.copytree(folders[family], tmp_path / "short")
    long = shutil.copytree(folders[family], tmp_path / "long")
    tensors = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in load_file(short / SINGLE).items()}
    save_file(tensors, short / SINGLE, {"format": "pt"})
    save_file({name: tensor.astype(np.float32) for name, tensor in tensors.items()}, long / SINGLE, {"format": "pt"})
    batch = tiny.batch_of(5, 9)
    found = [
        backend.forward(backend.open(tiny.plan_for(backend, folder, method=method, dtype=dtype), tiny.SHAPE), batch)
        for folder in (short, long)
    ]
    np.testing.assert_array_equal(*found)


def test_shards_are_one_model(backend, session_of, folders, family, tmp_path):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folders[family])
    model.save_pretrained(tmp_path / family, max_shard_size="40KB")
    assert len(list((tmp_path / family).glob("*.safetensors"))) > 1
    session = backend.open(tiny.plan_for(backend, tmp_path / family), tiny.SHAPE)
    batch = tiny.batch_of(5, 9)
    np.testing.assert_array_equal(backend.forward(session, batch), backend.forward(session_of(family), batch))


def test_opening_writes_nothing(backend, folders, family):
    before = {path: path.read_bytes() for path in folders[family].iterdir()}
    session = backend.open(tiny.plan_for(backend, folders[family], method="qlora"), tiny.SHAPE)
    # An answer as long as those of test_generate.py, which is compiled already.
    backend.generate(session, [3, 4], GenerateSettings(max_new_tokens=20, stop_tokens=()))
    assert {path: path.read_bytes() for path in folders[family].iterdir()} == before
