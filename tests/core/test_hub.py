"""Hub ids: real loading code, tried offline against a cache laid out as the hub client lays it out."""

import json
import shutil

import folders
import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import NotASafetensorsRepoError
from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata, TensorInfo

from mens_core import Planner
from mens_core.errors import ModelError
from mens_core.hf.hub import LAB_BASE, commit_of, find_model
from mens_core.hf.inventory import read_inventory

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A hub cache with one repository, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--owner--name"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return snapshot


def test_a_cached_repository_is_found_by_name_and_by_commit(cache):
    assert find_model("owner/name", None) == ("owner/name", cache)
    assert find_model("owner/name", COMMIT) == ("owner/name", cache)


def test_the_commit_of_a_snapshot_is_known_whatever_was_asked_for(cache, tmp_path):
    assert commit_of(find_model("owner/name", None)[1]) == COMMIT
    assert commit_of(find_model("owner/name", "main")[1]) == COMMIT
    for other in (tmp_path / COMMIT, tmp_path / "snapshots" / "main", cache / "adapter"):
        assert commit_of(other) is None


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(("model", "revision"), [("owner/other", None), ("owner/name", "v2")])
def test_what_is_not_cached_is_an_error_that_names_it(model, revision):
    with pytest.raises(ModelError, match=model) as caught:
        find_model(model, revision)
    assert "network" in str(caught.value)
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize("model", ["./owner/name", "/owner/name", "name", "a/b/c", "owner/na me"])
def test_what_is_neither_folder_nor_hub_id_is_never_looked_up(model):
    with pytest.raises(ModelError, match="no such model folder"):
        find_model(model, None)


def test_no_model_is_the_lab_base():
    name, folder = find_model(None, None)
    assert name == LAB_BASE
    assert (folder / "model.safetensors").stat().st_size <= 8_000_000


def test_a_folder_is_found_where_it_is(tmp_path):
    assert find_model(str(tmp_path), None) == (str(tmp_path), tmp_path.resolve())


@pytest.mark.parametrize("model", [None, "here"])
def test_a_revision_of_what_has_none_is_an_error(model, tmp_path):
    with pytest.raises(ModelError, match="only a hub id has revisions"):
        find_model(str(tmp_path) if model else None, "v2")


def _as_the_hub_answers(inventory):
    """The client's own records of a model folder's headers, with offsets from the end of each header."""
    first = min(info.start for info in inventory.tensors.values())
    tensors = {
        name: TensorInfo(info.dtype, list(info.shape), (info.start - first, info.stop - first))
        for name, info in inventory.tensors.items()
    }
    name = inventory.files[0].name
    file = SafetensorsFileMetadata(metadata={}, tensors=tensors)
    return SafetensorsRepoMetadata(
        metadata={}, sharded=False, weight_map=dict.fromkeys(tensors, name), files_metadata={name: file}
    )


def test_a_plan_of_a_hub_id_asks_for_headers_and_a_run_for_the_weights(cache, tmp_path, monkeypatch):
    whole = folders.qwen2_folder(tmp_path / "m", hidden=8, heads=2, layers=1, vocab=10)
    rows = folders.rows_folder(tmp_path / "d")
    inventory, asked = read_inventory(whole, None), []

    def download(repository, revision, allow_patterns):
        asked.append((repository, revision, allow_patterns))
        weights = ["model.safetensors"] if "*.safetensors" in allow_patterns else []
        for name in ("config.json", "tokenizer.json", *weights):
            shutil.copy(whole / name, cache / name)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", lambda *_, **__: _as_the_hub_answers(inventory))
    fields = {"data_dir": rows, "output_dir": tmp_path / "run", "seq_len": 64, "max_steps": 1, "warmup_steps": 0}
    plan = Planner().plan(model="owner/name", revision="main", **fields)
    assert not any(pattern.endswith(".safetensors") for _, _, patterns in asked for pattern in patterns)
    assert not (cache / "model.safetensors").exists()
    here = Planner().plan(model=str(whole), **fields)
    assert plan.weights == here.weights
    assert plan.contract_digest == here.contract_digest
    result = Planner().run(model="owner/name", revision="main", **fields)
    assert asked[-1][2][-2:] == ["*.safetensors", "*.safetensors.index.json"]
    assert result.manifest["finetune_contract_digest"] == plan.contract_digest
    # A branch was asked for; what it stood for is recorded, and is what PEFT will load.
    assert result.manifest["base_commit"] == COMMIT
    assert json.loads((tmp_path / "run" / "adapter_config.json").read_text())["revision"] == COMMIT
    assert Planner().plan(model="owner/name", revision="main", **fields).weights == here.weights


@pytest.mark.parametrize("error", [NotASafetensorsRepoError("pickles"), OSError("no network")])
def test_a_hub_that_has_no_headers_is_an_error_that_says_so(cache, tmp_path, monkeypatch, error):
    folders.qwen2_folder(tmp_path / "m", hidden=8, heads=2, layers=1, vocab=10)
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(tmp_path / "m" / name, cache / name)

    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", refuse)
    rows = folders.rows_folder(tmp_path / "d")
    with pytest.raises(ModelError, match=str(error)):
        Planner().plan(model="owner/name", data_dir=rows, output_dir=tmp_path / "run", seq_len=64)
